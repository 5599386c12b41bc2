"""One connection: a frame becomes a message, its processor is called, its answer goes back."""

from __future__ import annotations

from types import CoroutineType
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, ITCPTransport
from twisted.python.failure import Failure

from cafeteria_orch.wire.errors import FrameTooLong, OrchestratorError, ProtocolError, WrongAgency
from cafeteria_orch.wire.messages import TableBatch, batch_number_of, decode

from .counters import FAILED, UNKNOWN, Outcome, label_of, outcome_of
from .lines import log_bug, log_received, log_timeout
from .memory import MemoryShare
from .processing import ProcessingTimeout
from .reading import BUSY, MEMORY, Awaited
from .receiver import FrameReceiver
from .refusals import note_failure, refuse
from .responses import Exchange, Session, handle_processing_error, send_failure
from .state import OPEN, State
from .window import Window

if TYPE_CHECKING:
    from .factory import OrchestratorFactory

LONG_PAYLOAD = 128 * 1024
"""A longer payload, in bytes, is decoded when it is the connection's turn."""

_ANSWERING = (State.OPEN, State.ENDING)


class OrchestratorProtocol(FrameReceiver):
    """One client's connection.

    Its messages are processed one at a time and answered in their order. While one is in
    progress nothing more is read, so a connection holds one frame and one chunk at most. Only
    messages whose processors are pipelined are in progress together (see
    :class:`~.window.Window`).

    :param factory: that made it.
    :param address: the client's.
    :param number: tells its lines in the log from those of other connections.
    :ivar session: what is known of the client.
    :ivar batches: the number of its batches that were processed.
    :ivar rows: the number of rows in those.
    """

    factory: OrchestratorFactory
    batches = 0
    rows = 0

    _last_opcode: int | None = None
    # Whether a whole frame has come since the client was last waited for.
    _frame_came = False
    _processing: ProcessingTimeout | None = None

    def __init__(
        self, factory: OrchestratorFactory, address: IAddress | None, number: int = 0
    ) -> None:
        super().__init__(
            factory.reactor,
            factory.turns,
            factory.outbox,
            factory.timeouts,
            max_length=factory.max_frame_bytes,
            framing=factory.framing,
        )
        self.factory = factory
        ip = getattr(address, "host", "unix")
        self.session = Session(ip, factory.wall_time(), connection=number)
        self._memory = MemoryShare(factory.memory, self)
        self._window = Window()

    def connectionMade(self) -> None:
        """A client has connected."""
        super().connectionMade()
        transport = self.transport
        is_tcp = isinstance(transport.getPeer(), (IPv4Address, IPv6Address))
        if is_tcp and ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
            # A client whose machine is gone would keep its place for ever.
            transport.setTcpKeepAlive(True)
        transport.registerProducer(self, True)
        self.factory.connection_made(self)
        self.settle()

    def stringReceived(self, payload: bytes) -> None:
        """A payload is whole: process the message, or have it wait for what is before it."""
        self._frame_came = True
        opcode = payload[0] if payload else UNKNOWN
        window = self._window
        if window.is_busy or (window.count and not self.factory.processing(opcode).pipelined):
            self.hold(payload, BUSY)
        elif len(payload) <= LONG_PAYLOAD or not self.hold_for_turn(payload):
            self._receive(payload, Exchange(self, opcode, len(payload)))

    def lengthLimitExceeded(self, length: int) -> None:
        """A frame declares more than the limit: refuse it before it is read."""
        self.factory.counters.limit_hit("max_frame_bytes")
        self._refuse(FrameTooLong(length, self.MAX_LENGTH), b"", Exchange(self, UNKNOWN))

    def _receive(self, payload: bytes, exchange: Exchange) -> None:
        factory = self.factory
        try:
            message = decode(payload, factory.decoders)
            self.session.learn(message)
        except (ProtocolError, WrongAgency) as error:
            self._refuse(error, payload, exchange)
        except Exception:
            factory.counters.refused(exchange.opcode, Outcome.REJECTED)
            note_failure(factory, Outcome.REJECTED, batch_number_of(payload), exchange)
            self._window.add(exchange)
            self._crash(Failure(), exchange)
        else:
            if factory.log_info:
                log_received(self, exchange.opcode)
            self._process(message, exchange)

    def _process(self, message: Any, exchange: Exchange) -> None:
        factory, window = self.factory, self._window
        exchange.started_at = self.reactor.seconds()
        factory.counters.tallies[exchange.opcode].start()
        window.start(exchange)
        try:
            try:
                result = factory.handle_message(message, exchange)
            except Exception as error:
                result = handle_processing_error(message, exchange, error)
            # Most return a bool: to ask an abstract class, as Deferred is, takes long.
            if result is True or not isinstance(result, (Deferred, CoroutineType)):
                self._finish(result, message, exchange)
            else:
                self._finish_later(result, message, exchange)
        except Exception:
            self._crash(Failure(), exchange)
        if window.is_busy:
            self.reading.pause(BUSY)

    def _finish_later(
        self,
        result: Deferred[Any] | CoroutineType[Any, Any, Any],
        message: Any,
        exchange: Exchange,
    ) -> None:
        if not isinstance(result, Deferred):
            result = Deferred.fromCoroutine(result)
        processing = self.factory.processing(exchange.opcode)
        if processing.pipelined:
            self._window.share()
        if processing.times_out and self.state is not State.LOST:
            if self._processing is None:
                self._processing = ProcessingTimeout(self, self._window)
            self._processing.start()
        result.addErrback(self._fail, message, exchange)
        result.addCallback(self._finish, message, exchange)
        result.addErrback(self._crash, exchange)
        result.addCallback(self._go_on)

    def _go_on(self, _: object) -> None:
        # A message behind one that is not done keeps its place: the window may be full still.
        if self.reading.reasons & BUSY and not self._window.is_busy:
            self.resume(BUSY)
        else:
            self.settle()

    def _fail(self, failure: Failure, message: Any, exchange: Exchange) -> bool:
        return handle_processing_error(message, exchange, cast("BaseException", failure.value))

    def _finish(self, keep: object, message: Any, exchange: Exchange) -> None:
        if not exchange.settled:
            self._settle_unanswered(exchange)
        if not self._window.done(exchange):
            return
        tally = self.factory.counters.tallies[exchange.opcode]
        rows = message.amount if type(message) is TableBatch else 0
        if type(keep) is Outcome:
            outcome = keep
        else:
            outcome = outcome_of(exchange.payload)
            if outcome in FAILED:
                number = message.batch_number if type(message) is TableBatch else None
                note_failure(self.factory, outcome, number, exchange)
        tally.finish(outcome, rows)
        if tally.is_batch:
            self.batches += 1
            self.rows += rows
            self._last_opcode = exchange.opcode
            if tally.is_timed:
                seconds = self.reactor.seconds() - exchange.started_at
                self.factory.counters.batch_seconds.observe(seconds)
        if not (keep is None or keep):
            self.end()

    def _settle_unanswered(self, exchange: Exchange) -> None:
        if not self.factory.must_answer(exchange.opcode):
            exchange.close_slot()
            return
        self._warn(
            "no answer",
            "action: send_response | result: fail | ip: {ip} | opcode: {opcode}"
            " | error: {processor} did not answer",
            opcode=exchange.opcode,
            processor=self.factory.processor_name(exchange.opcode),
        )
        send_failure(exchange)

    def answered(self) -> None:
        """Send the answers up to the first message that has none.

        In the reactor's thread.
        """
        answers = self._window.answers()
        if self.state in _ANSWERING:
            for answer in answers:
                self.output.send(self.encodeAnswer(answer))
            if not self._delivering:
                self.output.settle()

    def _refuse(self, error: OrchestratorError, payload: bytes, exchange: Exchange) -> None:
        refuse(self, error, payload, exchange)
        self._window.add(exchange)
        send_failure(exchange, error.reason)
        self.end()

    def _crash(self, failure: Failure, exchange: Exchange) -> None:
        log_bug(self, exchange, failure)
        if not exchange.settled:
            send_failure(exchange)
        if self._window.done(exchange):
            self.factory.counters.tallies[exchange.opcode].finish(outcome_of(exchange.payload), 0)
        self.end()

    def delivered(self) -> None:
        """All that can be delivered now is: see what comes next."""
        memory, window, reading = self._memory, self._window, self.reading
        buffered, max_missing = self.holds()
        may_grow = memory.update(buffered, window.bytes, max_missing)
        if self._frame_came and memory.is_reserved:
            memory.leave()
            may_grow = memory.may_grow
        has_begun = buffered > 0 or max_missing > 0
        is_weighed = not may_grow or reading.reasons & MEMORY
        if self.state is OPEN and is_weighed:
            self._weigh_memory()
            has_begun = not self.is_empty
        has_sent, self._frame_came = self._frame_came, False
        if self.state is OPEN:
            reading.wait_for_client(not window.count, has_begun, has_sent)

    def _weigh_memory(self) -> None:
        """Pause while memory is short: for a reservation, or until what is in progress is done."""
        reading, memory = self.reading, self._memory
        if memory.may_grow:
            if reading.reasons & MEMORY and not memory.is_waiting:
                self.resume(MEMORY)
        elif not (reading.reasons & ~MEMORY or self._input_over):
            if not reading.reasons:
                reading.pause(MEMORY)
                self.factory.counters.limit_hit("max_in_flight_bytes")
            # A transport may deliver more though it is paused, and a frame begin with that.
            if memory.max_missing and not memory.is_waiting:
                memory.ask()

    def ends(self) -> None:
        """The connection takes no more messages: see whether all is done."""
        if self._window.count:
            return
        if self.state is State.ENDING:
            self.close()
        elif self.state is State.LOST and (self.is_empty or not self.reading.reasons):
            self.drop_input()
            self._memory.update(0, 0, 0)
            self.factory.connection_lost(self)

    def memory_unused(self) -> None:
        """The client does not use its reservation while others wait for memory."""
        # While it is paused, it is not the client's fault that nothing comes.
        if self.state is OPEN and not self.reading.reasons:
            self.factory.counters.limit_hit("frame_timeout")
            self._warn(
                "slow frame",
                "action: receive_message | result: fail | ip: {ip} | error: a frame came too"
                " slowly while others waited for memory, {missing} bytes were missing",
            )
            self.end()

    @property
    def may_grow(self) -> bool:
        """Whether there is memory for what the client sends."""
        return self._memory.may_grow

    def readConnectionLost(self) -> None:
        """The client sends no more: there is nothing to wait for with it."""
        self._memory.leave()
        self.reading.resume(MEMORY)
        super().readConnectionLost()

    def input_ended(self, how: str) -> None:
        """No more comes. A frame that is cut off by that is logged.

        A connection that is reset before it has sent a byte is no failure: balancers check
        servers so.
        """
        if self.missing or (how != "connection closed" and self.received_bytes):
            self._warn(
                how,
                "action: receive_message | result: fail | ip: {ip} | error: {how},"
                " {missing} bytes of a frame were missing",
                how=how,
            )
        self.end()

    def drop_input(self) -> None:
        """Deliver nothing more, and wait for nothing that the client may send."""
        super().drop_input()
        self._memory.leave()
        self.reading.stop()

    def end(self) -> None:
        """Take no more messages, and close when those in progress are answered."""
        self.drop_input()
        if self.state is OPEN:
            self._enter(State.ENDING)
        self.settle()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        super().abort()
        self.settle()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """The connection is gone. Messages that were read whole are still processed."""
        self._memory.leave()
        self.reading.stop()
        self.reading.resume(MEMORY)
        if self._processing is not None:
            self._processing.stop()
        super().connectionLost(reason)

    def client_timed_out(self, awaited: Awaited) -> None:
        """The client has not done in time what it is waited for to do: close."""
        self.factory.counters.limit_hit(
            "idle_timeout" if awaited is Awaited.FRAME else "frame_timeout"
        )
        log_timeout(self, awaited)
        if awaited in {Awaited.FRAME, Awaited.REST}:
            self.end()
        else:
            self.abort()

    def _warn(self, kind: str, message: str, **fields: object) -> None:
        fields.update(self.session.log_fields, missing=self.missing)
        self.factory.limited_log.warn(kind, message, **fields)

    @property
    def in_progress(self) -> int:
        """How many of its messages are being processed."""
        return self._window.count

    @property
    def table(self) -> str | None:
        """The table of its last batch; ``None`` if there was none."""
        return None if self._last_opcode is None else label_of(self._last_opcode)

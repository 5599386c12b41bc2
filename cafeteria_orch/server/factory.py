"""The factory: the processor and the decoder of each opcode, and the connections."""

from __future__ import annotations

import threading
from functools import partial
from inspect import iscoroutinefunction
from itertools import count
from typing import Any

from constantly import NamedConstant
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IPushProducer
from twisted.internet.protocol import ServerFactory
from twisted.logger import Logger, LogLevel
from zope.interface import implementer

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.common.quick_log import InfoLine
from cafeteria_orch.common.rate_limit import RateLimitedLog, RateLimits
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, SNIFFABLE_BELOW, Framing
from cafeteria_orch.wire.messages import DECODERS, Decoder, RawMessage
from cafeteria_orch.wire.opcodes import RESPONSES, BatchStatus, Opcode

from . import lines, responses
from .connection import OrchestratorProtocol
from .counters import Counters
from .limits import ConnectionLimits
from .memory import DEFAULT_MAX_IN_FLIGHT_BYTES, MemoryBudget
from .outbox import Outbox
from .reading import Pause
from .registration import OnRejection, Processor, Registration, name_of
from .responses import Exchange
from .threads import ProcessorThreads
from .timeouts import DEFAULT_TIMEOUTS, Timeouts
from .turns import Turns

PREVIEW_ROWS = 2
"""How many rows of a batch the debug preview shows at most."""

_STATUS_TEXTS: dict[int, str] = {
    BatchStatus.CONTINUE: "Continue",
    BatchStatus.EOF: "EOF",
    BatchStatus.CANCEL: "Cancel",
}

_log = Logger()

_DATA_LINE = InfoLine(
    _log,
    "action: data_message_received | opcode: {opcode} | amount: {amount} | status: {status}",
)


@implementer(IPushProducer)
class OrchestratorFactory(ServerFactory):
    """Makes the protocol of each connection, and handles the messages of all of them.

    A sink sees it as the producer of what is stored: a sink that has taken as much as it can hold
    calls :meth:`pauseProducing`, and :meth:`resumeProducing` when there is room again.

    :param reactor: for time and threads; a test may pass a ``Clock``.
    :param max_frame_bytes: the longest payload, in bytes; a longer one is refused.
    :param framing: of all connections; ``None`` leaves it to the first byte of each.
    :param max_connections: the number of connections at once, beyond which a new one is closed;
        ``None`` for no limit.
    :param max_connections_per_host: the same for one address.
    :param max_in_flight_bytes: the bytes that the frames of all connections may take together,
        from the first byte of each until its message is processed.
    :param timeouts: how long to wait for clients and processors.
    :param wall_time: says what time it is, in seconds since the epoch; the reactor's own clock
        if it is not given.
    :param log_level: less important events are not even created.
    :ivar thread: the identifier of the reactor's thread, from the first connection on.
    :ivar counters: the messages that came, and their outcomes.
    :ivar on_rejection: is told of each message that was rejected or malformed.
    :ivar rate_limits: of the lines that clients can cause again and again.
    :ivar limited_log: writes most of those of this room.
    :ivar connection_log: writes those that name the module of the connection.
    :raises ValueError: if the first byte decides about the framing, and ``max_frame_bytes`` is
        too high for that.
    """

    noisy = False
    thread: int

    def __init__(
        self,
        reactor: Any,
        *,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        framing: Framing | None = None,
        max_connections: int | None = None,
        max_connections_per_host: int | None = None,
        max_in_flight_bytes: int = DEFAULT_MAX_IN_FLIGHT_BYTES,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        wall_time: WallTime | None = None,
        log_level: NamedConstant = LogLevel.info,
    ) -> None:
        self.reactor = reactor
        if framing is None and max_frame_bytes >= SNIFFABLE_BELOW:
            raise ValueError(
                "the framings cannot be told apart with frames of 16 MiB or more: lower"
                " max-frame-bytes, or name the framing"
            )
        self.max_frame_bytes = max_frame_bytes
        self.framing = framing
        self.log_info: bool = log_level <= LogLevel.info
        self.log_debug: bool = log_level <= LogLevel.debug
        self.decoders: dict[int, Decoder] = dict(DECODERS)
        self.turns = Turns(reactor)
        self.outbox = Outbox(reactor)
        self.counters = Counters()
        self.on_rejection: OnRejection = lambda *_: None
        self.rate_limits = RateLimits(reactor)
        self.limited_log = RateLimitedLog(self.rate_limits, _log)
        self.connection_log = RateLimitedLog(self.rate_limits, lines.log)
        self.timeouts = timeouts
        self.wall_time: WallTime = wall_time or reactor.seconds
        self.memory = MemoryBudget(reactor, max_in_flight_bytes, max_frame_bytes, timeouts.frame)
        self._limits = ConnectionLimits(
            self.rate_limits, self.counters, max_connections, max_connections_per_host
        )
        self.connections: set[OrchestratorProtocol] = set()
        self._numbers = count(1)
        # By opcode; :data:`~.counters.UNKNOWN` is the last of them.
        self._registrations = [Registration(self._handle_data_message, is_default=True)] * 257
        for opcode, call in {
            Opcode.FINISHED: self._handle_finished,
            **dict.fromkeys(RESPONSES, self._ignore_response),
        }.items():
            self._registrations[opcode] = Registration(call, answers=False, is_default=True)
        self._registrations[Opcode.STORE_IDENTITY] = Registration(
            self._handle_store_identity, is_default=True
        )
        self._threads = ProcessorThreads(reactor)
        self._paused = False
        # An ordered set: the connection that has been paused longest is resumed first.
        self._paused_by_sink: dict[OrchestratorProtocol, None] = {}
        self._draining = False
        self._drained: list[Deferred[None]] = []

    def buildProtocol(  # type: ignore[override]
        self, addr: IAddress | None
    ) -> OrchestratorProtocol | None:
        """Make the protocol of a new connection.

        :return: ``None``, which closes the connection, while draining and beyond a limit.
        """
        if self._draining or not self._limits.admits(getattr(addr, "host", None)):
            return None
        self.thread = threading.get_ident()
        return OrchestratorProtocol(self, addr, next(self._numbers))

    def register_processor(
        self,
        opcode: int,
        processor: Processor,
        *,
        blocking: bool = False,
        answers: bool = True,
        pipelined: bool = False,
        times_out: bool = True,
        decoder: Decoder | None = None,
        replace: bool = False,
    ) -> None:
        """Have all messages of an opcode processed by a function.

        :param opcode: 0 to 255.
        :param processor: called as ``processor(message, client)`` in the reactor's thread.
        :param blocking: call it in a thread of a pool of our own instead. It may answer
            from there.
        :param answers: say ``False`` if it may be done without having answered; otherwise
            that gives FAIL, and a warning.
        :param pipelined: let it have up to :data:`~.window.MAX_IN_PROGRESS` messages of a
            connection in progress at once, beside others that are pipelined too. It answers in
            any order; the answers leave in the order of the messages.
        :param times_out: say ``False`` if the processing timeout does not hold for it: it has
            a patience of its own, as a store has.
        :param decoder: makes the message of the body's bytes, raising ``ValueError`` if
            they are malformed. Without it, a message of the wire is decoded as the wire
            says, and any other is a :class:`~cafeteria_orch.wire.messages.RawMessage`.
        :param replace: take the place of the processor that the opcode has.
        :raises TypeError: if the processor or the decoder cannot be called, or a coroutine
            function is said to be blocking.
        :raises ValueError: if the opcode is not one byte, or has a processor already.
        """
        if isinstance(opcode, bool) or not isinstance(opcode, int):
            raise TypeError(f"an opcode is a number, not {type(opcode).__name__}")
        if not 0 <= opcode <= 255:
            raise ValueError(f"opcode {opcode}: an opcode is one byte, 0 to 255")
        for what, function in (("processor", processor), ("decoder", decoder)):
            if not (callable(function) or (function is None and what == "decoder")):
                raise TypeError(f"opcode {opcode}: the {what} {function!r} cannot be called")
        if blocking and iscoroutinefunction(processor):
            raise TypeError(f"opcode {opcode}: an async processor cannot run in a thread")
        if not (self.processing(opcode).is_default or replace):
            raise ValueError(
                f"opcode {opcode} is processed by {self.processor_name(opcode)} already;"
                " say replace=True to take its place"
            )
        call = partial(self._threads.call, processor) if blocking else processor
        answers = answers and self.is_data_message(opcode)
        self._registrations[opcode] = Registration(
            call, name_of(processor), answers, pipelined, times_out
        )
        default = DECODERS.get(opcode, partial(RawMessage, opcode))
        self.decoders[opcode] = default if decoder is None else decoder
        self.counters.measure_time(opcode)

    def handle_message(self, message: Any, client: Exchange) -> Any:
        """Process a message as its opcode is registered, or as the seed has it by default.

        :param message: what the opcode's decoder returned.
        :param client: the message's handle; its opcode decides.
        :return: what the processor returned (see :data:`~.registration.Processor`).
        """
        return self._registrations[client.opcode].call(message, client)

    def is_data_message(self, opcode: int) -> bool:
        """Whether an opcode carries data: it is neither FINISHED nor a response."""
        return opcode != Opcode.FINISHED and opcode not in RESPONSES

    def must_answer(self, opcode: int) -> bool:
        """Whether a client waits for an answer to a message of this opcode."""
        return self._registrations[opcode].answers

    def processing(self, opcode: int) -> Registration:
        """How messages of an opcode are processed."""
        return self._registrations[opcode]

    def processor_name(self, opcode: int) -> str:
        """Who processes messages of this opcode: a name for the log."""
        return self.processing(opcode).name

    def get_status_text(self, batch_status: int) -> str:
        """The name of a batch's status; ``Unknown(n)`` for one that has none."""
        return _STATUS_TEXTS.get(batch_status, f"Unknown({batch_status})")

    def log_data_message(self, message: Any, client: Exchange) -> None:
        """Log that a data message came, and at debug a preview of what is in it."""
        if not self.log_info:
            return
        status = getattr(message, "status", None)
        status_text = "-" if status is None else self.get_status_text(status)
        session = client.session
        _DATA_LINE.log(
            {
                "ip": session.ip,
                "connection": session.connection,
                "session": session.stored_id,
                "opcode": client.opcode,
                "amount": getattr(message, "amount", "-"),
                "status": status_text,
            }
        )
        if self.log_debug and hasattr(message, "rows"):
            self.log_batch_preview(message, client, status_text)

    def log_finished(self, client: Exchange) -> None:
        """Log that a client has sent all it had."""
        if self.log_info:
            self.limited_log.info(
                "finished",
                "action: finished | result: success | ip: {ip} | agency_id: {agency_id}",
                **client.session.log_fields,
                agency_id="-" if client.agency_id is None else client.agency_id,
            )

    def log_batch_preview(self, message: Any, client: Exchange, status_text: str) -> None:
        """Log the columns and the first rows of a batch, at debug."""
        sample = [list(row) for row in message.rows[:PREVIEW_ROWS]]
        _log.debug(
            "action: batch_preview | batch_number: {batch_number} | status: {status}"
            " | opcode: {opcode} | keys: {keys} | sample_count: {sample_count}"
            " | sample: {sample}",
            **client.session.log_fields,
            batch_number=message.batch_number,
            status=status_text,
            opcode=int(message.opcode),
            keys=list(message.columns),
            sample_count=len(sample),
            sample=sample,
        )

    def connection_made(self, connection: OrchestratorProtocol) -> None:
        """A client has connected."""
        self.connections.add(connection)
        self.counters.accepted_connections += 1
        self._limits.opened(connection.session.ip)
        if self._paused:
            self._pause(connection)
        if self.log_info:
            lines.log_accepted(connection)

    def connection_lost(self, connection: OrchestratorProtocol) -> None:
        """A client is gone, and no message of it is in progress any more."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        self.counters.received_bytes += connection.received_bytes
        self._limits.closed(connection.session.ip)
        self._paused_by_sink.pop(connection, None)
        if self.log_debug:
            _log.debug(
                "action: close_connection | result: success | ip: {ip}",
                **connection.session.log_fields,
            )
        if self._draining and not self.connections:
            self._report_drained()

    @property
    def received_bytes(self) -> int:
        """How many bytes all connections have read, with those that are gone."""
        here = sum(connection.received_bytes for connection in self.connections)
        return self.counters.received_bytes + here

    def pauseProducing(self) -> None:
        """Take no more messages of any connection."""
        self._paused = True
        # A connection with fewer messages in progress goes on before one with more.
        by_share = sorted(
            self.connections - self._paused_by_sink.keys(), key=lambda each: each.in_progress
        )
        for connection in by_share:
            self._pause(connection)

    def resumeProducing(self) -> None:
        """Take messages again, until they fill the sink again."""
        self._paused = False
        while self._paused_by_sink and not self._paused:
            connection = next(iter(self._paused_by_sink))
            del self._paused_by_sink[connection]
            connection.resume(Pause.SINK)

    def stopProducing(self) -> None:
        """The sink is gone; its processors tell."""

    def start(self) -> None:
        """Take new connections; a drain takes none."""
        self._draining = False

    def drain(self) -> Deferred[None]:
        """Accept no connections; close each open one after its messages in progress.

        :return: fires when none is left.
        """
        self._draining = True
        for connection in list(self.connections):
            connection.end()
        if not self.connections:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._drained.append(waiting)
        return waiting

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in list(self.connections):
            connection.abort()

    def stop_threads(self) -> None:
        """Let go of the threads of blocking processors; what still runs is not waited for."""
        self._threads.stop()

    def _pause(self, connection: OrchestratorProtocol) -> None:
        self._paused_by_sink[connection] = None
        connection.pause(Pause.SINK)

    def _report_drained(self) -> None:
        waiting, self._drained = self._drained, []
        for deferred in waiting:
            if not deferred.called:
                deferred.callback(None)

    def _handle_data_message(self, message: Any, client: Exchange) -> bool:
        if self.log_info:
            self.log_data_message(message, client)
        responses.send_success(client)
        return True

    def _handle_finished(self, _: Any, client: Exchange) -> bool:
        self.log_finished(client)
        return False

    def _handle_store_identity(self, _: Any, client: Exchange) -> bool:
        """There is no store."""
        responses.send(client, Opcode.STORE_IDENTITY)
        return True

    def _ignore_response(self, _: Any, client: Exchange) -> bool:
        self.limited_log.warn(
            "response",
            "action: receive_message | result: ignored | ip: {ip} | opcode: {opcode}"
            " | error: a response is the server's to send",
            **client.session.log_fields,
            opcode=client.opcode,
        )
        return True

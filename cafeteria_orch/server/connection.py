"""One connection: a frame becomes a message, its handler is called, its answer goes back."""

from __future__ import annotations

import threading
from functools import partial
from inspect import iscoroutine
from typing import Any, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, ITCPTransport
from twisted.logger import Logger
from twisted.python.failure import Failure

from cafeteria_orch.wire.errors import FrameTooLong, ProcessorHung, ProtocolError
from cafeteria_orch.wire.messages import ClientHello, Finished, TableBatch, decode
from cafeteria_orch.wire.opcodes import FailReason

from .counters import ANSWERED, UNKNOWN, Outcome, label_of
from .handler import MessageHandler
from .reading import FlowReceiver, Hold
from .responses import Exchange, Session, handle_processing_error, send_failure
from .timeouts import Deadline
from .window import Window

LONG_PAYLOAD = 128 * 1024
"""Decoding more than this, in bytes, takes a turn: it may keep others waiting."""

MOST_OUTGOING = 64 * 1024
"""So many bytes of answers wait for each other to leave in one write."""

_PROCESSED = int(Outcome.PROCESSED)

_log = Logger()


class OrchestratorProtocol(FlowReceiver):
    """One client's connection.

    Its messages are processed one at a time and answered in their order. While one is in
    hand nothing more is read, so what a connection holds is bounded by a frame and a chunk.
    Only of messages whose processors are pipelined several are in hand at once (see
    :class:`~cafeteria_orch.server.window.Window`).

    :param handler: the factory.
    :ivar thread: the identifier of the reactor's thread.
    :ivar batches: how many of its batches were processed.
    :ivar rows: how many rows were in those.
    :ivar address: of the client; ``None`` if it is what the transport has for the peer.
    :ivar common_name: in the client's certificate.
    """

    thread: int
    batches = 0
    rows = 0
    address: IAddress | None = None
    common_name: str | None = None

    _last_opcode: int | None = None
    _first = True
    # What waits for its turn to be decoded.
    _long_payload: bytes | None = None
    _ending = False

    def __init__(self, handler: MessageHandler) -> None:
        super().__init__(handler.reactor, handler.timeouts, handler.in_flight)
        self.handler = handler
        self.MAX_LENGTH = handler.max_frame_bytes
        self.framing = handler.framing
        self.log_debug = handler.log_debug
        self._window = Window()
        self._tallies = handler.counters.tallies
        self._outgoing = bytearray()
        self._processing = Deadline(self.reactor, self._processing_expired)

    def connectionMade(self) -> None:
        """A client has connected."""
        self.thread = threading.get_ident()
        peer = self.transport.getPeer()
        is_tcp = ITCPTransport.providedBy(self.transport)
        if is_tcp and isinstance(peer, (IPv4Address, IPv6Address)):
            self.transport.setTcpNoDelay(True)
        ip = getattr(self.address or peer, "host", "unix")
        now = self.handler.wall_time()
        self.session = Session(ip, now, common_name=self.common_name)
        super().connectionMade()
        self.handler.connection_made(self)

    def stringReceived(self, payload: bytes) -> None:
        """A frame is whole: decode it, have it handled, see to its answer."""
        size = len(payload)
        self.frame_came = True
        self.in_hand_bytes += size
        if size > LONG_PAYLOAD:
            self._long_payload = payload
            self._take_turn()
        else:
            self._receive(payload)

    def _receive(self, payload: bytes) -> None:
        exchange = Exchange(self, payload[0] if payload else UNKNOWN, len(payload))
        self._window.add(exchange)
        try:
            message = decode(payload, self.handler.decoders)
        except ProtocolError as error:
            self._refuse(error, exchange)
        except Exception:
            self._crash(Failure(), exchange)
            self.handler.counters.refused(exchange.opcode, Outcome.REJECTED)
        else:
            if self.in_hand and not self.handler.is_pipelined(exchange.opcode):
                self._window.wait(partial(self._handle, message, exchange))
                self.pauseProducing()
            else:
                self._handle(message, exchange)

    def lengthLimitExceeded(self, length: int) -> None:
        """A frame declares more than the limit: refuse it before it is read."""
        self.limit_hit("max_frame_bytes")
        exchange = Exchange(self, UNKNOWN)
        self._window.add(exchange)
        self._refuse(FrameTooLong(length, self.MAX_LENGTH), exchange)

    def framesDelivered(self) -> None:
        """What was whole is handled, or waits: the answers leave in one write."""
        self.flush()
        super().framesDelivered()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """The connection is gone. What was read of it whole is still handled."""
        super().connectionLost(reason)
        self._processing.cancel()
        self.proceed()

    def answered(self, exchange: Exchange) -> None:
        """Send what is answered up to the first message that is not.

        Together with whatever else this ``dataReceived`` gives.
        """
        answers = self._window.answers()
        if self._closing or self._lost:
            return
        for answer in answers:
            self._outgoing += self.encodeAnswer(answer)
        if not self.delivering or len(self._outgoing) >= MOST_OUTGOING:
            self.flush()

    def processor_name(self, opcode: int) -> str:
        """Who processes messages of this opcode: a name for the log."""
        return self.handler.processor_name(opcode)

    def close(self) -> None:
        """Close so that the last answer arrives; handle nothing more."""
        super().close()
        self._forget_if_idle()

    @property
    def in_hand(self) -> int:
        """How many of its messages are being processed."""
        return len(self._window.in_hand)

    @property
    def table(self) -> str | None:
        """What its last batch was for; ``None`` if there was none."""
        return None if self._last_opcode is None else label_of(self._last_opcode)

    def limit_hit(self, limit: str) -> None:
        """A limit was hit; the name of its option, with underscores."""
        self.handler.counters.limit_hit(limit)

    def drain(self) -> None:
        """Close now if idle, otherwise as soon as what is in hand is answered."""
        self.end()

    def _note_identity(self, message: object) -> None:
        if isinstance(message, ClientHello):
            if not self._first:
                raise ProtocolError("a CLIENT_HELLO that is not the first message")
            self.session.client_id = message.client_id
        elif isinstance(message, Finished):
            self.session.agency_id = message.agency_id
        self._first = False

    def _handle(self, message: Any, exchange: Exchange) -> None:
        try:
            self._note_identity(message)
            if self.handler.log_info:
                _log.info(
                    "action: receive_message | result: success | ip: {ip} | opcode: {opcode}",
                    ip=self.session.ip,
                    opcode=exchange.opcode,
                )
            self._process(message, exchange)
        except ProtocolError as error:
            self._refuse(error, exchange)
        except Exception:
            self._crash(Failure(), exchange)

    def _process(self, message: Any, exchange: Exchange) -> None:
        exchange.started_at = self.reactor.seconds()
        self._tallies[exchange.opcode].received += 1
        self._window.start(exchange)
        try:
            result = self.handler.handle_message(message, exchange)
        except (Exception, ProcessorHung) as error:
            result = handle_processing_error(message, exchange, error)
        if iscoroutine(result):
            result = Deferred.fromCoroutine(result)
        if isinstance(result, Deferred):
            self._finish_later(result, message, exchange)
        else:
            self._done(result, message, exchange)
        if self._window.busy:
            self.pauseProducing()
        elif self.paused:
            self.proceed()

    def _finish_later(self, result: Deferred[Any], message: Any, exchange: Exchange) -> None:
        def failed(failure: Failure) -> bool:
            error = cast("BaseException", failure.value)
            return handle_processing_error(message, exchange, error)

        def done(keep: object) -> None:
            self._done(keep, message, exchange)
            self.account()
            self.proceed()

        if self.handler.is_pipelined(exchange.opcode):
            self._window.share()
        if not (self._processing.is_set or self._lost):
            self._processing.start(self._timeouts.processing)
        result.addErrback(failed).addCallback(done).addErrback(self._crash, exchange)

    def _done(self, keep: object, message: Any, exchange: Exchange) -> None:
        if not exchange.settled:
            if self.handler.must_answer(exchange.opcode):
                _log.warn(
                    "action: send_response | result: fail | ip: {ip} | opcode: {opcode}"
                    " | error: {processor} did not answer",
                    ip=self.session.ip,
                    opcode=exchange.opcode,
                    processor=self.processor_name(exchange.opcode),
                )
                send_failure(exchange)
            else:
                exchange.settled = True
                self.answered(exchange)
        if self._window.done(exchange):
            tally = self._tallies[exchange.opcode]
            outcome = keep if type(keep) is Outcome else ANSWERED.get(exchange.payload, _PROCESSED)
            tally.outcomes[outcome] += 1
            if tally.is_batch:
                rows = len(message.rows) if type(message) is TableBatch else 0
                tally.rows[outcome] += rows
                self.rows += rows
                self.batches += 1
                self._last_opcode = exchange.opcode
                if tally.is_timed:
                    seconds = self.reactor.seconds() - exchange.started_at
                    self.handler.counters.batch_seconds.observe(seconds)
        self.in_hand_bytes -= exchange.size
        if not (keep is None or keep):
            self.end()

    def proceed(self) -> None:
        """Something is done, or a hold is gone: go on as far as that allows."""
        if self._closing or self._ending:
            self.end()
        elif self._holds:
            return
        elif call := self._window.turn():
            call()
        elif self._window.busy:
            return
        elif self._long_payload is not None:
            self._take_turn()
        elif self.paused or self._lost:
            self.resumeProducing()
        elif not self.in_hand:
            self.watch()

    def _take_turn(self) -> None:
        if self.handler.turns.take():
            self._receive_long()
        else:
            self.hold(Hold.TURN)
            self.handler.turns.wait(self._receive_long)

    def _receive_long(self) -> None:
        self._holds.discard(Hold.TURN)
        # With another hold, or behind its end, the turn is passed on; when that hold is gone
        # it is asked for again.
        payload = self._long_payload
        if payload is None or self._holds or self._ending or self._closing:
            return
        self._long_payload = None
        self._receive(payload)

    def end(self) -> None:
        """Take no more messages, and close when what is in hand is answered."""
        self._ending = True
        if self._closing:
            self._forget_if_idle()
        elif self.in_hand:
            self.pauseProducing()
        else:
            self.close()

    def _refuse(self, error: ProtocolError, exchange: Exchange) -> None:
        _log.error(
            "action: receive_message | result: fail | ip: {ip} | opcode: {opcode}"
            " | error: {error}",
            ip=self.session.ip,
            opcode=exchange.opcode,
            error=error,
        )
        opcode = exchange.opcode
        is_known = opcode in self.handler.decoders
        self.handler.counters.refused(opcode if is_known else UNKNOWN, Outcome.MALFORMED)
        send_failure(exchange, error.reason)
        self.end()

    def _crash(self, failure: Failure, exchange: Exchange) -> None:
        _log.failure(
            "action: receive_message | result: fail | ip: {ip} | opcode: {opcode}",
            failure,
            ip=self.session.ip,
            opcode=exchange.opcode,
        )
        if not exchange.settled:
            send_failure(exchange)
        if self._window.done(exchange):
            outcome = ANSWERED.get(exchange.payload, _PROCESSED)
            self._tallies[exchange.opcode].outcomes[outcome] += 1
        self.end()

    def flush(self) -> None:
        """Send the answers that wait for each other."""
        if self._outgoing:
            self.transport.write(bytes(self._outgoing))
            self._outgoing.clear()

    def inputEnded(self) -> None:
        """No more comes. If a frame was cut off by that, it is logged."""
        if self.missing or self._was_reset:
            _log.warn(
                "action: receive_message | result: fail | ip: {ip}"
                " | error: {what}, {missing} bytes of a frame were missing",
                ip=self.session.ip,
                what="connection reset" if self._was_reset else "connection closed",
                missing=self.missing,
            )
        self.end()

    def _processing_expired(self) -> None:
        """Answer in place of the processors that are not done; they keep their messages."""
        limit = self._timeouts.processing or 0.0
        now = self.reactor.seconds()
        owed = [
            exchange
            for exchange in self._window.in_hand
            if not exchange.settled and self.handler.must_answer(exchange.opcode)
        ]
        late = [exchange for exchange in owed if exchange.started_at + limit <= now]
        for exchange in late:
            exchange.is_late = True
            send_failure(exchange, FailReason.TRY_AGAIN)
        if late:
            self.limit_hit("processing_timeout")
            _log.warn(
                "action: message_processing | result: late | ip: {ip} | messages: {messages}"
                " | error: {processor} takes longer than {seconds:g} s, the limit of"
                " --processing-timeout",
                ip=self.session.ip,
                messages=len(late),
                processor=self.processor_name(late[0].opcode),
                seconds=limit,
            )
        left = [exchange.started_at for exchange in owed if not exchange.settled]
        if left:
            self._processing.start(min(left) + limit - now)

    def _forget_if_idle(self) -> None:
        if self._lost and not self.in_hand:
            # What waited for its turn is not handled any more.
            self.in_hand_bytes = 0
            self.account()
            self.handler.connection_lost(self)

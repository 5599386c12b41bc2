"""A stream of bytes, cut into payloads; and a close that lets the last answer arrive."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IPushProducer,
    ISSLTransport,
    ITCPTransport,
)
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch.wire.errors import FrameTooLong
from cafeteria_orch.wire.framing import INT32, SUCCESS, FrameDecoder, Framing

from .outbox import Outbox, Output
from .reading import Awaited, Pause, Reading
from .state import OPEN, State
from .timeouts import Timeouts
from .turns import Turns

CLOSE_TIMEOUT = 2.0
"""How long, in seconds, an orderly close waits for the peer before it becomes an abort."""

MAX_MESSAGES = 16
"""How many messages of a connection are handled before others are served, if it has no turn."""

MAX_MESSAGES_IN_TURN = 256
"""How many are handled in one turn."""

TURN_SECONDS = 0.002
"""How long, in seconds, a connection's messages are handled before others are served."""

_READ_SIZE = 65536


@implementer(IHalfCloseableProtocol, IPushProducer)
class FrameReceiver(Int32StringReceiver):
    """An :class:`Int32StringReceiver` that is linear, fair, and closes in good order.

    It is one to its users: ``stringReceived``, ``lengthLimitExceeded``, ``sendString`` and
    ``MAX_LENGTH`` are those of the stock class. It decodes by itself, since the stock class joins
    all it holds at every chunk, which is quadratic in the length of a frame, and delivers a frame
    again where ``stringReceived`` pauses and resumes.

    Payloads are delivered while there is no pause reason, and a few at a time: a chunk may hold
    13,000 of them, and other connections are served in between.

    To its transport it is the producer of answers: while the transport holds too many of them, the
    connection takes no messages.

    ``delivered()``, ``input_ended(how)``, ``ends()``, ``client_timed_out(awaited)`` and
    ``may_grow`` are hooks.

    :param reactor: for time.
    :param turns: of all connections.
    :param outbox: of all connections.
    :param timeouts: how long the client is waited for.
    :param max_length: the longest payload, in bytes.
    :param framing: ``None`` leaves it to the first byte.
    :ivar reading: the pause reasons of this connection.
    :ivar output: what it sends; from ``connectionMade`` on.
    :ivar state: what the connection still does.
    :ivar received_bytes: the number of bytes that have come.
    """

    transport: Any
    output: Output
    state = State.OPEN
    received_bytes = 0

    _input_over = False
    # How the input ended, until that is dealt with.
    _input_end = ""
    _is_read = True
    _delivering = False
    _has_turn = False
    # A payload that came out of its frame and has to wait.
    _held: bytes | None = None
    _abort_call: IDelayedCall | None = None

    def __init__(
        self,
        reactor: Any,
        turns: Turns,
        outbox: Outbox,
        timeouts: Timeouts,
        *,
        max_length: int,
        framing: Framing | None,
    ) -> None:
        self.reactor = reactor
        self.timeouts = timeouts
        self.reading = Reading(self)
        self._turns = turns
        self._outbox = outbox
        self._decoder = FrameDecoder(max_length, framing)

    def connectionMade(self) -> None:
        """There is a transport."""
        self.output = Output(self._outbox, self.transport)

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the transport; deliver the payloads that are whole."""
        self.received_bytes += len(data)
        if self.state is OPEN:
            self._decoder.feed(data)
            self.deliver()

    def deliver(self) -> None:
        """Deliver payloads as far as the pause reasons and the turn allow; then settle."""
        if self._delivering:
            return
        if not self.reading.reasons:
            self._delivering = True
            try:
                self._deliver()
            except FrameTooLong as error:
                self.lengthLimitExceeded(error.length)
            finally:
                self._delivering = False
        self._has_turn = False
        self.settle()

    def _deliver(self) -> None:
        reading, received, seconds = self.reading, self.stringReceived, self.reactor.seconds
        payloads = self._decoder.payloads()
        if self._held is not None:
            payloads = chain([self._held], payloads)
            self._held = None
        left = MAX_MESSAGES_IN_TURN if self._has_turn else MAX_MESSAGES
        until = seconds() + TURN_SECONDS
        for payload in payloads:
            if left <= 0 or seconds() >= until:
                if self._has_turn or not self._turns.take():
                    self._held = payload
                    self._wait_for_turn()
                    return
                self._has_turn = True
                left = MAX_MESSAGES_IN_TURN
                until = seconds() + TURN_SECONDS
            received(payload)
            if reading.reasons:
                return
            left -= 1

    def hold(self, payload: bytes, reason: Pause) -> None:
        """Have the payload that is being delivered wait; it is the next one to be delivered."""
        self._held = payload
        self.reading.pause(reason)

    def hold_for_turn(self, payload: bytes) -> bool:
        """Have the payload that is being delivered wait, unless it is this connection's turn.

        :return: whether it has to wait.
        """
        if self._has_turn or self._turns.take():
            # A turn is for one such payload.
            self._has_turn = False
            return False
        self._held = payload
        self._wait_for_turn()
        return True

    def _wait_for_turn(self) -> None:
        self.reading.pause(Pause.TURN)
        self._turns.wait(self._begin_turn)

    def _begin_turn(self) -> None:
        # With another pause reason the turn is passed on; it is asked for again after that.
        self._has_turn = True
        self.resume(Pause.TURN)

    def pause(self, reason: Pause) -> None:
        """Take no more messages for a reason, until :meth:`resume`."""
        self.reading.pause(reason)
        if not self._delivering:
            self.settle()

    def resume(self, reason: Pause) -> None:
        """A reason to pause is gone: go on, if it was the last."""
        self.reading.resume(reason)
        self.deliver()

    def pauseProducing(self) -> None:
        """The transport holds too many answers."""
        self.pause(Pause.OUTPUT)

    def resumeProducing(self) -> None:
        """The client has read them."""
        self.resume(Pause.OUTPUT)

    def stopProducing(self) -> None:
        """The connection is lost, and its socket not closed yet: read what came before.

        A client that closes without reading its answers resets the connection by that, with
        whole batches of it still in the kernel.
        """
        if not _is_plain_tcp(self.transport):
            return
        with suppress(OSError):
            while self.state is OPEN and self.may_grow:
                data = self.transport.getHandle().recv(_READ_SIZE)
                if not data:
                    return
                self.dataReceived(data)

    def readConnectionLost(self) -> None:
        """The client sends no more. What it is owed still goes out."""
        self._input_over = True
        if self.state is State.CLOSING:
            self.transport.loseConnection()
            return
        if self.state is OPEN:
            self._input_end = "connection closed"
        self.deliver()

    def writeConnectionLost(self) -> None:
        """Our half-close has gone out."""

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """The connection is gone. Messages that were read whole are still delivered."""
        if self.state is OPEN and not self._input_over:
            # Many clients close TLS without a close_notify, which looks like a reset.
            is_tls = ISSLTransport.providedBy(self.transport)
            is_closed = reason.check(ConnectionDone) is not None or is_tls
            self._input_end = "connection closed" if is_closed else "connection reset"
        self._enter(State.LOST)
        self.output.drop()
        self._input_over = True
        if self._abort_call is not None and self._abort_call.active():
            self._abort_call.cancel()
        self.reading.resume(Pause.OUTPUT)
        self.deliver()

    @property
    def MAX_LENGTH(self) -> int:  # type: ignore[override]
        """The longest payload, in bytes."""
        return self._decoder.max_length

    @property
    def paused(self) -> bool:  # type: ignore[override]
        """Whether it delivers nothing for now."""
        return self.reading.reasons != 0

    @property
    def framing(self) -> Framing | None:
        """The framing of this connection; ``None`` until its first byte tells."""
        return self._decoder.framing

    @property
    def missing(self) -> int:
        """How many bytes are missing of the frame that has begun; 0 between frames."""
        return self._decoder.missing

    def client_timed_out(self, awaited: Awaited) -> None:
        """The client has not done in time what it is waited for to do. A hook."""

    @property
    def may_grow(self) -> bool:
        """Whether there is memory for what the client sends. A hook."""
        return True

    def settle(self) -> None:
        """All that can be delivered now is: see what comes next."""
        if self._delivering:
            return
        self.output.settle()
        self.delivered()
        reasons, state = self.reading.reasons, self.state
        reads = not reasons if state is OPEN else state is State.CLOSING
        if reads is not self._is_read:
            self._read(reads)
        if self._input_end and (self.is_empty or not reasons):
            self.input_ended(self._input_end)
        if self.state is not OPEN:
            self.ends()

    def delivered(self) -> None:
        """All that can be delivered now is. A hook."""

    def ends(self) -> None:
        """The connection takes no more messages. A hook, called whenever something is done."""

    def input_ended(self, how: str) -> None:
        """No more comes, and all that came whole was delivered. A hook.

        :param how: ``connection closed`` or ``connection reset``.
        """

    def encodeAnswer(self, payload: bytes) -> bytes:
        """Frame an answer: of its body, as much as the peer can read."""
        framing = self._decoder.framing or INT32
        if payload == SUCCESS:
            return framing.success
        return framing.encode_answer(payload)

    def encodeFrame(self, payload: bytes) -> bytes:
        """Frame a payload as a client of this connection does."""
        return (self.framing or INT32).encode(payload)

    def sendString(self, string: bytes) -> None:
        """Send a frame."""
        self.output.send(self.encodeFrame(string))
        if not self._delivering:
            self.output.settle()

    def holds(self) -> tuple[int, int]:
        """Tell what it has not delivered yet.

        :return: the number of bytes, and how many may be missing of the frame that has begun.
        """
        buffered, max_missing = self._decoder.holds()
        return (buffered if self._held is None else buffered + len(self._held)), max_missing

    @property
    def is_empty(self) -> bool:
        """Whether it has delivered all that came, to the last byte."""
        return self.holds() == (0, 0) and self._held is None

    def drop_input(self) -> None:
        """Deliver nothing more of what has come, and take no more."""
        self._decoder.clear()
        self._held = None
        self._input_end = ""

    def close(self) -> None:
        """Close so that the last answer arrives; deliver nothing more.

        With input unread a plain close would become a reset, and the client might lose its
        answers. So: half-close, read and drop, and abort after :data:`CLOSE_TIMEOUT`.
        """
        self._enter(State.CLOSING)
        self.drop_input()
        self.output.flush()
        self.transport.unregisterProducer()
        self._abort_call = self.reactor.callLater(CLOSE_TIMEOUT, self.abort)
        if not self._is_read:
            self._read(True)
        if self._input_over or not _is_plain_tcp(self.transport):
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        self.drop_input()
        # A TLS transport raises if it is aborted after the connection is lost.
        if self.state is not State.LOST:
            if self.state is not State.CLOSING:
                self._enter(State.CLOSING)
            self.transport.abortConnection()

    def _enter(self, state: State) -> None:
        self.state = self.state.become(state)

    def _read(self, reads: bool) -> None:
        # A transport that is resumed after a half-close reports the end of input for ever.
        if not self._input_over:
            self._is_read = reads
            if reads:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()


def _is_plain_tcp(transport: object) -> bool:
    # TLS claims to be TCP too, and passes on to the socket below it what it must not.
    return ITCPTransport.providedBy(transport) and not ISSLTransport.providedBy(transport)

"""When a connection is read, and how long its client is waited for."""

from __future__ import annotations

from enum import Enum
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .memory import InFlight
from .receiver import ClosingReceiver
from .responses import Session
from .timeouts import Deadline, Timeouts

_log = Logger()


class Hold(Enum):
    """Why a connection takes no more messages for now, besides those that it has in hand."""

    OUTPUT = "the client does not read its answers"
    SINK = "too much waits to be stored"
    TURN = "others that sent much are before it"
    MEMORY = "too many frames have begun"


class Awaited(Enum):
    """What a client is waited for to do."""

    FRAME = "send a frame"
    REST = "send the rest of a frame"
    READING = "read its answers"


class FlowReceiver(ClosingReceiver):
    """A :class:`ClosingReceiver` that is read while nothing speaks against it.

    Its client is waited for as :class:`~.timeouts.Timeouts` say; time in which it is
    held for other reasons than what the client does is not counted against the client.

    ``proceed()``, ``end()``, ``limit_hit(limit)`` and ``in_hand`` are hooks.

    :param reactor: for time.
    :param timeouts: how long the client is waited for.
    :param in_flight: what all connections hold.
    :ivar session: who the client is.
    :ivar frame_came: to be set when a frame is whole.
    :ivar in_hand_bytes: of the messages that came and are not done; to be kept by the subclass.
    """

    session: Session
    frame_came = False
    in_hand_bytes = 0

    _awaited: Awaited | None = None
    _admitted = False
    _admitted_between_frames = False
    # When it was last looked at how fast a frame comes, and what was missing of it then.
    _paced_at = 0.0
    _missing_then = 0
    # What this connection has in the sums of in_flight.
    _held = 0
    _held_in_hand = 0

    def __init__(self, reactor: Any, timeouts: Timeouts, in_flight: InFlight) -> None:
        super().__init__()
        self.reactor = reactor
        self._timeouts = timeouts
        self._in_flight = in_flight
        self._holds: set[Hold] = set()
        self._patience = Deadline(reactor, self._expired)

    def connectionMade(self) -> None:
        """A client has connected."""
        self.transport.registerProducer(_OutputGate(self), True)
        self.watch()

    def readConnectionLost(self) -> None:
        """The client sends no more: there is nothing to wait for with it."""
        super().readConnectionLost()
        if Hold.MEMORY in self._holds:
            self._stop_waiting()
            self.release(Hold.MEMORY)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """The connection is gone."""
        super().connectionLost(reason)
        self._patience.cancel()
        self._holds -= {Hold.OUTPUT, Hold.MEMORY}
        self._stop_waiting()

    def framesDelivered(self) -> None:
        """What was whole is handled, or waits."""
        if self.frame_came:
            self.frame_came = False
            self._awaited = None
            if self._admitted:
                self._stop_waiting()
        elif self._admitted_between_frames and self.missing:
            self._stop_waiting()
        self.account()
        may_grow = not (self.paused or self._admitted or self._input_over)
        if self._held and may_grow and self._in_flight.is_short:
            self.hold(Hold.MEMORY)
            self.limit_hit("max_in_flight_bytes")
            self._in_flight.wait(self)
        super().framesDelivered()
        self.watch()

    def pauseProducing(self) -> None:
        """Deliver nothing and read nothing; it is not the client that is waited for."""
        super().pauseProducing()
        self._patience.suspend()

    def hold(self, reason: Hold) -> None:
        """Take no more messages until this and every other reason to hold is gone."""
        if not self._closing:
            self._holds.add(reason)
            self.pauseProducing()
            self.watch()

    def release(self, reason: Hold) -> None:
        """A reason to hold is gone."""
        self._holds.discard(reason)
        self.proceed()
        self.watch()

    def admit(self) -> None:
        """Read on until the frame that has begun is whole, or the next one has begun."""
        self._admitted = True
        self._admitted_between_frames = not self.missing
        self._set_pace()
        self.account()
        self.release(Hold.MEMORY)

    def keep_pace(self) -> None:
        """Others wait: close, unless the frame comes fast enough to be whole in its time."""
        limit = self._timeouts.frame
        if limit is not None and not self.paused:
            share = min(1.0, (self.reactor.seconds() - self._paced_at) / limit)
            if self._missing_then - self.missing < self._missing_then * share:
                self._close_slow()
                return
        self._set_pace()

    def close(self) -> None:
        """Close so that the last answer arrives; handle nothing more."""
        super().close()
        self._patience.cancel()
        self._stop_waiting()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        super().abort()
        self._patience.cancel()
        self._stop_waiting()

    def account(self) -> None:
        """Tell the common account what this connection holds."""
        in_hand = self.in_hand_bytes
        held = self.buffered + in_hand
        if self._admitted:
            held += self.missing
        # A frame that was set aside for and is in hand now takes as much as before.
        if held != self._held or in_hand != self._held_in_hand:
            change = held - self._held
            self._held = held
            self._in_flight.in_hand += in_hand - self._held_in_hand
            self._held_in_hand = in_hand
            self._in_flight.change(change)

    def watch(self) -> None:
        """Wait for what the client is to do next, if it is its turn to do anything."""
        awaited = self._now_awaited()
        if awaited is None:
            self._patience.suspend()
            if self._awaited is Awaited.READING:
                # That is done: the next time it is a new one.
                self._awaited = None
        elif awaited is self._awaited:
            self._patience.resume()
        else:
            self._awaited = awaited
            timeouts = self._timeouts
            is_idle = awaited is Awaited.FRAME
            self._patience.start(timeouts.idle if is_idle else timeouts.frame)

    @property
    def in_hand(self) -> int:
        """How many of its messages are being processed. A hook."""
        return 0

    def proceed(self) -> None:
        """A hold is gone: go on as far as that allows. A hook."""

    def limit_hit(self, limit: str) -> None:
        """A limit was hit; the name of its option, with underscores. A hook."""

    def end(self) -> None:
        """Take no more messages, and close when what is in hand is answered. A hook."""

    def _now_awaited(self) -> Awaited | None:
        if self._closing or self._lost:
            return None
        if Hold.OUTPUT in self._holds:
            return Awaited.READING
        if self.paused:
            return None
        if self.missing:
            return Awaited.REST
        return None if self.in_hand else Awaited.FRAME

    def _set_pace(self) -> None:
        self._paced_at = self.reactor.seconds()
        self._missing_then = self.missing

    def _close_slow(self) -> None:
        self.limit_hit("frame_timeout")
        _log.warn(
            "action: receive_message | result: fail | ip: {ip} | error: a frame came too slowly"
            " while others waited for memory, {missing} bytes were missing",
            ip=self.session.ip,
            missing=self.missing,
        )
        self.end()

    def _stop_waiting(self) -> None:
        self._admitted = self._admitted_between_frames = False
        self.account()
        self._in_flight.leave(self)

    def _expired(self) -> None:
        self.limit_hit("idle_timeout" if self._awaited is Awaited.FRAME else "frame_timeout")
        if self._awaited is Awaited.FRAME:
            _log.info(
                "action: close_connection | result: success | ip: {ip}"
                " | error: idle for {seconds:g} s, the limit of --idle-timeout",
                ip=self.session.ip,
                seconds=self._timeouts.idle,
            )
            self.end()
        elif self._awaited is Awaited.REST:
            _log.warn(
                "action: receive_message | result: fail | ip: {ip} | error: a frame took longer"
                " than {seconds:g} s, the limit of --frame-timeout, {missing} bytes were missing",
                ip=self.session.ip,
                seconds=self._timeouts.frame,
                missing=self.missing,
            )
            self.end()
        else:
            _log.warn(
                "action: send_response | result: fail | ip: {ip} | error: the client did not"
                " read its answers for {seconds:g} s, the limit of --frame-timeout",
                ip=self.session.ip,
                seconds=self._timeouts.frame,
            )
            self.abort()


@implementer(IPushProducer)
class _OutputGate:
    """Tells a connection when its transport holds more answers than it should."""

    def __init__(self, connection: FlowReceiver) -> None:
        self._connection = connection

    def pauseProducing(self) -> None:
        self._connection.hold(Hold.OUTPUT)

    def resumeProducing(self) -> None:
        self._connection.release(Hold.OUTPUT)

    def stopProducing(self) -> None:
        self._connection.read_what_is_left()

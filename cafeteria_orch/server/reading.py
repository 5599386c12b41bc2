"""Whether a connection is read, and what its client is waited for meanwhile."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, Protocol

from .timeouts import Countdown, Timeouts


class Pause(IntEnum):
    """Why a connection takes no more messages for now: bits of one number."""

    OUTPUT = 1
    """The client does not read its answers."""
    SINK = 2
    """The store is slower than its clients."""
    TURN = 4
    """Other connections are served first."""
    MEMORY = 8
    """The memory budget is short."""
    BUSY = 16
    """Messages in progress come first."""


BUSY = Pause.BUSY
MEMORY = Pause.MEMORY
OUTPUT = Pause.OUTPUT
"""Bound for what runs for each message: on Python 3.11, to look up ``Pause.BUSY`` is a slow
call."""


class Awaited(Enum):
    """What a client is waited for to do."""

    FRAME = "send a frame"
    REST = "send the rest of a frame"
    ANSWERS = "read its answers"


_FRAME = Awaited.FRAME


class Client(Protocol):
    """Whose connection it is: what :class:`Reading` asks and tells of it.

    :ivar reactor: for time.
    :ivar timeouts: how long the client is waited for.
    :ivar received_bytes: the number of bytes that it has sent.
    """

    reactor: Any
    timeouts: Timeouts
    received_bytes: int

    def client_timed_out(self, awaited: Awaited) -> None:
        """The client has not done in time what it is waited for to do."""


class Reading:
    """The pause reasons of one connection, and the one timer of its client.

    A connection is read while there is no reason to pause. While there is one, the client is not
    waited for, but to read its answers: its time does not run.

    :param client: of the connection.
    :ivar reasons: the sum of the :class:`Pause` reasons; 0 while the connection is read.
    """

    __slots__ = ("_awaited", "_client", "_countdown", "reasons")

    def __init__(self, client: Client) -> None:
        self.reasons = 0
        self._client = client
        self._awaited = _FRAME
        # Created when it is needed: by default a client may be idle for any time.
        self._countdown: Countdown | None = None

    def pause(self, reason: Pause) -> None:
        """Add a reason to pause."""
        self.reasons |= reason

    def resume(self, reason: Pause) -> None:
        """Remove a reason to pause."""
        self.reasons &= ~reason

    def wait_for_client(self, is_idle: bool, has_begun: bool, has_sent: bool) -> None:
        """Wait for what the client is to do next, if that is up to the client.

        :param is_idle: whether no message of the client is in progress.
        :param has_begun: whether the client has sent part of a frame.
        :param has_sent: whether it has sent a whole frame since the last call: its time starts
            again.
        """
        countdown = self._countdown
        if self.reasons & OUTPUT:
            awaited, seconds = Awaited.ANSWERS, self._client.timeouts.frame
        elif self.reasons or not (is_idle or has_begun):
            if countdown is None:
                return
            if has_sent or self._awaited is Awaited.ANSWERS:
                self.stop()
            else:
                countdown.suspend()
            return
        elif has_begun:
            awaited, seconds = Awaited.REST, self._client.timeouts.frame
        else:
            awaited, seconds = _FRAME, self._client.timeouts.idle
        if countdown is not None and awaited is self._awaited and not has_sent:
            countdown.resume()
        elif seconds is None:
            self.stop()
        else:
            self._awaited = awaited
            if countdown is None:
                countdown = Countdown(self._client.reactor, self._progress, self._time_is_up)
                self._countdown = countdown
            countdown.start(seconds)

    def stop(self) -> None:
        """Wait for nothing: there is no time that the client must keep, or the connection ends."""
        if self._countdown is not None:
            self._countdown.cancel()
            self._countdown = None

    def _progress(self) -> int:
        return self._client.received_bytes

    def _time_is_up(self) -> None:
        self._countdown = None
        self._client.client_timed_out(self._awaited)

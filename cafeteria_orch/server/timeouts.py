"""How long a connection waits: for its client, and for the processors of its messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from twisted.internet.interfaces import IDelayedCall


class Timeouts(NamedTuple):
    """Seconds; ``None`` for any time.

    :ivar idle: that a client may send nothing between two frames, with nothing of it in hand.
    :ivar frame: from the first byte of a frame to its last, and until a client that is owed
        more answers than its transport holds has read them.
    :ivar processing: that a processor may take before its client is told to try again later.
    """

    idle: float | None = None
    frame: float | None = 30.0
    processing: float | None = 60.0


DEFAULT_TIMEOUTS = Timeouts()


class Deadline:
    """A timer that is set anew at next to no cost, and can be suspended.

    Where it is set to a later time, the call that is scheduled stays as it is and looks again
    when it comes.

    :param reactor: for time.
    :param expired: what is called when it is reached.
    """

    __slots__ = ("_at", "_call", "_expired", "_left", "_reactor")

    def __init__(self, reactor: Any, expired: Callable[[], None]) -> None:
        self._reactor = reactor
        self._expired = expired
        self._at: float | None = None
        self._left: float | None = None
        self._call: IDelayedCall | None = None

    @property
    def is_set(self) -> bool:
        """Whether it will be reached, if nothing changes."""
        return self._at is not None

    def start(self, seconds: float | None) -> None:
        """Set it so far from now; ``None`` for never."""
        self._left = None
        if seconds is None:
            self._at = None
            return
        self._at = self._reactor.seconds() + seconds
        if self._call is None:
            self._call = self._reactor.callLater(seconds, self._look)
        elif self._call.getTime() > self._at:
            self._call.reset(seconds)

    def suspend(self) -> None:
        """Let the time that is left not run, until :meth:`resume`."""
        if self._at is not None:
            self._left = self._at - self._reactor.seconds()
            self._at = None

    def resume(self) -> None:
        """Let it run again, if it was suspended."""
        if self._left is not None:
            self.start(max(0.0, self._left))

    def cancel(self) -> None:
        """It is not needed any more."""
        self._at = self._left = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _look(self) -> None:
        self._call = None
        if self._at is None:
            return
        left = self._at - self._reactor.seconds()
        if left > 0:
            self._call = self._reactor.callLater(left, self._look)
        else:
            self._at = None
            self._expired()

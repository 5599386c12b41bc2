"""How long a connection waits: for its client, and for the processors of its messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from twisted.internet.interfaces import IDelayedCall


class Timeouts(NamedTuple):
    """Seconds; ``None`` for any time.

    :ivar idle: that a client may send nothing between two frames, with no message in progress.
    :ivar frame: from the first byte of a frame to its last, and until a client that is owed
        more answers than its transport holds has read them.
    :ivar processing: that a processor may take before its client is told to try again later.
    """

    idle: float | None = None
    frame: float | None = 30.0
    processing: float | None = 60.0


DEFAULT_TIMEOUTS = Timeouts()


class Countdown:
    """A timer that can be suspended, and is merciful: progress made just in time counts.

    A process that was stopped for a while finds the time up before it has read what came in that
    while. So when the time is up the reactor is given a turn to read, and another one as long as
    that brings progress.

    :param reactor: for time.
    :param progress: a number that changes with each step of progress.
    :param expired: called when the time is up, and no more progress is made.
    """

    __slots__ = ("_call", "_expired", "_left", "_progress", "_reactor", "_seen")

    def __init__(
        self, reactor: Any, progress: Callable[[], int], expired: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._progress = progress
        self._expired = expired
        self._left: float | None = None
        self._call: IDelayedCall | None = None
        # The progress that was made when the time was up.
        self._seen: int | None = None

    def start(self, seconds: float) -> None:
        """Begin from the start."""
        self._left = self._seen = None
        if self._call is None:
            self._call = self._reactor.callLater(seconds, self._judge)
        else:
            self._call.reset(seconds)

    def suspend(self) -> None:
        """Keep the time that is left until :meth:`resume`."""
        if self._call is not None:
            left = self._call.getTime() - self._reactor.seconds()
            self.cancel()
            self._left = left

    def resume(self) -> None:
        """Go on, if it is suspended."""
        if self._left is not None:
            self.start(max(0.0, self._left))

    def cancel(self) -> None:
        """Forget it."""
        self._left = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _judge(self) -> None:
        self._call = None
        progress = self._progress()
        if progress == self._seen:
            self._expired()
        else:
            self._seen = progress
            self._call = self._reactor.callLater(0, self._judge)

"""How much memory the messages of all connections may take, and who may go on when it is short."""

from __future__ import annotations

from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall

DEFAULT_MAX_IN_FLIGHT_BYTES = 256 * 1024 * 1024
"""Bytes of frames, as they came."""

PACE_INTERVAL = 2.0
"""How often, in seconds, it is asked whether those that were admitted make use of it."""


class Waiter(Protocol):
    """A connection that may not read on for now."""

    @property
    def missing(self) -> int:
        """How many bytes are still to come of a frame that has begun; 0 between frames."""

    def admit(self) -> None:
        """Read on until the frame that has begun is whole, or the next one has begun.

        What is missing of it is to be set aside, by :meth:`InFlight.change`.
        """

    def keep_pace(self) -> None:
        """Others wait: close, unless the frame comes as fast as it has to."""


class InFlight:
    """Counts the bytes of all frames that have begun and are not done.

    Up to half of the limit whoever sends is read. Beyond it connections go on in turn, each for
    one frame, whose memory is set aside before: so what has begun can be ended, and no number of
    half frames keeps the whole ones out. A connection that has to wait holds one chunk, which is
    all that the limit may be exceeded by. Who was admitted and does not send keeps the others
    waiting for a moment only.

    :param reactor: for time.
    :param limit: bytes.
    :param longest: the longest frame, in bytes.
    :ivar bytes: that are held, or set aside.
    :ivar in_hand: those of them that processors have.
    """

    def __init__(self, reactor: Any, limit: int, longest: int) -> None:
        self._reactor = reactor
        self._limit = limit
        self._longest = longest
        self.bytes = 0
        self.in_hand = 0
        # Ordered sets: who came first is the first.
        self._waiting: dict[Waiter, None] = {}
        self._admitted: dict[Waiter, None] = {}
        self._admitting = False
        self._pace: IDelayedCall | None = None

    @property
    def is_short(self) -> bool:
        """Whether a frame that is not whole must wait for its turn."""
        return self.bytes >= self._limit // 2

    def change(self, by: int) -> None:
        """A connection holds more bytes, or fewer."""
        self.bytes += by
        if by < 0:
            self._admit()

    def wait(self, waiter: Waiter) -> None:
        """Have a connection admitted when it is its turn."""
        self._waiting[waiter] = None
        self._admit()

    def leave(self, waiter: Waiter) -> None:
        """A connection does not wait any more, and needs nothing that is set aside."""
        self._waiting.pop(waiter, None)
        if self._admitted.pop(waiter, waiter) is None:
            self._admit()

    def _admit(self) -> None:
        # Who is admitted may be done at once, and calls this again.
        if self._admitting:
            return
        self._admitting = True
        try:
            while self._waiting and self._has_room():
                waiter = next(iter(self._waiting))
                del self._waiting[waiter]
                # One between frames may have nothing more to send: nobody is to wait for it.
                if waiter.missing:
                    self._admitted[waiter] = None
                waiter.admit()
        finally:
            self._admitting = False
        if self._waiting and self._admitted and self._pace is None:
            self._pace = self._reactor.callLater(PACE_INTERVAL, self._check_pace)

    def _check_pace(self) -> None:
        self._pace = None
        if self._waiting:
            for waiter in list(self._admitted):
                waiter.keep_pace()
            self._admit()

    def _has_room(self) -> bool:
        if self.bytes + self._longest <= self._limit:
            return True
        # Half frames alone fill it, and none of them would ever end: one may.
        in_hand_share = max(self._limit // 2, self._longest)
        return not self._admitted and self.in_hand + self._longest <= in_hand_share

"""The memory budget: how many bytes the frames of all connections may take together.

The rules:

1. A connection holds the bytes that it has buffered and those of its messages in progress.
2. Memory is short from half of the limit on. Until then every connection is read.
3. While it is short, a connection that has begun a frame is read only with a reservation: for all
   that may be missing of that frame, which is a whole frame until its length is known. The
   reservation shrinks as the length becomes known and as bytes come.
4. Reservations are given in the order in which connections ask, as far as the limit allows.
5. Half frames alone must not fill the limit: if nobody has a reservation and most of what is held
   is not in progress, the first that asks gets one all the same.
6. While a connection waits, reservations must be used: a client whose bytes come more slowly than
   the frame timeout demands, and that is :data:`MAX_LAG` behind by that, is closed. A time in
   which the process was stopped does not count: what came meanwhile is read first.

So the frames of all connections exceed the limit by one frame at most (rule 5), and by one chunk
for each connection that waits: it is read before it is known to begin a frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IDelayedCall

from .reading import Pause

if TYPE_CHECKING:
    from .connection import OrchestratorProtocol

DEFAULT_MAX_IN_FLIGHT_BYTES = 256 * 1024 * 1024
"""Bytes of frames, as they come."""

MAX_LAG = 1.5
"""How long, in seconds, a reservation that others wait for may go unused. A client that lost a
packet has the time to send it again."""

_CHECK_INTERVAL = MAX_LAG / 8


class MemoryBudget:
    """The sum of what all connections hold and have reserved, and the queue of those that wait.

    :param reactor: for time.
    :param limit: bytes.
    :param max_frame_bytes: the longest frame.
    :param frame_timeout: seconds that a frame may take; ``None`` for any time.
    :ivar used: bytes that are held or reserved.
    :ivar in_progress: those of them that processors have.
    """

    def __init__(
        self, reactor: Any, limit: int, max_frame_bytes: int, frame_timeout: float | None
    ) -> None:
        self.reactor = reactor
        self.frame_timeout = frame_timeout
        self.used = 0
        self.in_progress = 0
        self._limit = limit
        self._max_frame_bytes = max_frame_bytes
        # Ordered sets: the first is the one that came first.
        self._waiting: dict[MemoryShare, None] = {}
        self._reserving: dict[MemoryShare, None] = {}
        self._granting = False
        self._pace_call: IDelayedCall | None = None

    @property
    def is_short(self) -> bool:
        """Whether a frame that has begun needs a reservation."""
        return self.used >= self._limit // 2

    def change(self, used: int, in_progress: int) -> None:
        """Add to the sums what a share has changed by."""
        self.used += used
        self.in_progress += in_progress
        if self._waiting and (used < 0 or in_progress < 0):
            self._grant()

    def ask(self, share: MemoryShare) -> None:
        """Put a connection into the queue for a reservation."""
        self._waiting[share] = None
        self._grant()

    def leave(self, share: MemoryShare) -> None:
        """A connection neither waits for a reservation nor has one any more."""
        self._waiting.pop(share, None)
        self._reserving.pop(share, None)
        self._grant()

    def _grant(self) -> None:
        # A connection may use up its reservation at once, and call this again.
        if self._granting:
            return
        self._granting = True
        try:
            while self._waiting:
                share = next(iter(self._waiting))
                if not self._has_room(share.max_missing):
                    break
                del self._waiting[share]
                self._reserving[share] = None
                share.reserve(self.reactor.seconds())
        finally:
            self._granting = False
        if self._waiting and self._reserving and self._pace_call is None:
            due = self.reactor.seconds() + _CHECK_INTERVAL
            self._pace_call = self.reactor.callLater(_CHECK_INTERVAL, self._check_paces, due)

    def _has_room(self, needed: int) -> bool:
        if self.used + needed <= self._limit:
            return True
        max_in_progress = max(self._limit // 2, self._max_frame_bytes)
        return not self._reserving and self.in_progress + needed <= max_in_progress

    def _check_paces(self, due: float) -> None:
        self._pace_call = None
        if self._waiting and self.frame_timeout is not None:
            now = self.reactor.seconds()
            was_stopped = now - due > _CHECK_INTERVAL
            for share in list(self._reserving):
                if was_stopped:
                    share.judge_from(now)
                else:
                    share.check_pace(now, self.frame_timeout)
        self._grant()


class MemoryShare:
    """What one connection holds of the budget.

    :param budget: of all connections.
    :param connection: goes on when it gets the reservation that it waits for, and is told when its
        client does not use the reservation while others wait.
    :ivar used: the bytes that the budget counts for it.
    :ivar max_missing: how many bytes may be missing of the frame that has begun.
    :ivar is_waiting: whether the connection waits for a reservation.
    """

    __slots__ = (
        "_budget",
        "_connection",
        "_held",
        "_in_progress",
        "_pace",
        "is_waiting",
        "max_missing",
        "used",
    )

    def __init__(self, budget: MemoryBudget, connection: OrchestratorProtocol) -> None:
        self._budget = budget
        self._connection = connection
        self.is_waiting = False
        self.max_missing = 0
        # What the connection holds, and how much of that is in progress.
        self._held = 0
        self._in_progress = 0
        self.used = 0
        # Of the reservation.
        self._pace: _Pace | None = None

    @property
    def is_reserved(self) -> bool:
        """Whether the connection has a reservation."""
        return self._pace is not None

    def update(self, buffered: int, in_progress: int, max_missing: int) -> bool:
        """Tell what the connection holds now.

        :param buffered: the bytes of no message in progress.
        :param in_progress: the bytes of the messages in progress.
        :param max_missing: how many bytes may be missing of the frame that has begun.
        :return: :attr:`may_grow`.
        """
        self.max_missing = max_missing
        self._held = held = buffered + in_progress
        used = held if self._pace is None else held + max_missing
        # A reserved frame takes as much as before once it is in progress.
        if used != self.used or in_progress != self._in_progress:
            changed, self.used = used - self.used, used
            moved, self._in_progress = in_progress - self._in_progress, in_progress
            self._budget.change(changed, moved)
        return not held or self._pace is not None or not self._budget.is_short

    @property
    def may_grow(self) -> bool:
        """Whether the connection may be read (rules 2 and 3)."""
        return not self._held or self._pace is not None or not self._budget.is_short

    def ask(self) -> None:
        """Wait for a reservation for the frame that has begun."""
        self.is_waiting = True
        self._budget.ask(self)

    def reserve(self, now: float) -> None:
        """Have the reservation that the connection waits for. For the budget to call."""
        self.is_waiting = False
        self._pace = _Pace(now, self._connection.received_bytes, self.max_missing)
        self._recount()
        self._connection.resume(Pause.MEMORY)

    def leave(self) -> None:
        """The frame is whole, or the connection ends: neither wait nor reserve."""
        if self.is_waiting or self.is_reserved:
            self.is_waiting = False
            self._pace = None
            self._recount()
            self._budget.leave(self)

    def check_pace(self, now: float, frame_timeout: float) -> None:
        """Judge the use of the reservation (rule 6)."""
        pace, received = self._pace, self._connection.received_bytes
        if pace is not None and pace.is_too_slow(now, received, self.max_missing, frame_timeout):
            self._connection.memory_unused()

    def judge_from(self, now: float) -> None:
        """Judge what comes from now on."""
        if self._pace is not None:
            self._pace.judge_from(now, self._connection.received_bytes, self.max_missing)

    def _recount(self) -> None:
        self.update(self._held - self._in_progress, self._in_progress, self.max_missing)


class _Pace:
    """How fast a client uses its reservation.

    :param now: the time, in seconds.
    :param received: the bytes that have come of the client.
    :param missing: the bytes that may be missing of its frame.
    """

    __slots__ = ("_judged_at", "_lag", "_missing", "_received")

    def __init__(self, now: float, received: int, missing: int) -> None:
        # By how many seconds the client is behind.
        self._lag = 0.0
        self.judge_from(now, received, missing)

    def judge_from(self, now: float, received: int, missing: int) -> None:
        """Judge what comes from now on."""
        self._judged_at = now
        self._received = received
        self._missing = missing

    def is_too_slow(self, now: float, received: int, missing: int, frame_timeout: float) -> bool:
        """Judge what has come since the last time."""
        elapsed = now - self._judged_at
        # In the time of a whole frame, all that was missing must come.
        gained = frame_timeout * (received - self._received) / max(1, self._missing)
        # Bytes that came fast do not make up for a silence that follows.
        self._lag = max(0.0, self._lag + elapsed - gained)
        self.judge_from(now, received, missing)
        if self._lag < MAX_LAG:
            return False
        self._lag = 0.0
        return True

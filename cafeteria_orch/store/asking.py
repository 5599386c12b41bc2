"""Asks the store now and then, in a thread: nothing of what operators see waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Optional, TypeVar

from cafeteria_orch.common.clock import WallTime

PATIENCE = 2.0
"""How long, in seconds, a store may take for it; a reader keeps a file's WAL from being cut."""

REST = 10
"""A store is not asked again before that many times as long as it took have passed."""

MAX_REST = 120.0
"""The limit of that, in seconds: a disk may have hung for hours."""

_T = TypeVar("_T")

Read = Callable[[Callable[[], bool]], Optional[_T]]
"""Reads something of a store, unless what it is given says that it is too late."""


@dataclass(frozen=True)
class Answer(Generic[_T]):
    """What the store said.

    :ivar asked_at: when it was asked, in seconds since the epoch.
    :ivar content: what was asked for; ``None`` if it took too long, or could not be read.
    """

    asked_at: float
    content: _T | None


class Asker(Generic[_T]):
    """Asks a store now and then, while somebody wants to know.

    :param reactor: measures the time, and takes the answer from the thread.
    :param read: reads what is asked for.
    :param interval: how old, in seconds, an answer may be before the store is asked again.
    :param wall_time: says what time it is; the reactor's own clock by default.
    :ivar latest: the store's last answer.
    """

    def __init__(
        self, reactor: Any, read: Read[_T], interval: float, wall_time: WallTime | None = None
    ) -> None:
        self._reactor = reactor
        self._read = read
        self._interval = interval
        self._wall_time: WallTime = wall_time or reactor.seconds
        self._asked_at = 0.0
        self._next_at = interval
        self._is_asking = False
        self.latest: Answer[_T] | None = None

    def refresh(self) -> None:
        """Ask, unless the last answer is new or the next one on its way; does not wait."""
        now = self._reactor.seconds()
        is_old = self.latest is None or now >= self._next_at
        if is_old and not self._is_asking:
            self._is_asking = True
            self._asked_at = now
            # A daemon: a disk that hangs must not keep the process from ending.
            threading.Thread(
                target=self._ask, args=(self._wall_time(), now), name="cafeorch-asker", daemon=True
            ).start()

    def _ask(self, asked_at: float, began: float) -> None:
        content = None
        try:
            content = self._read(lambda: self._reactor.seconds() - began > PATIENCE)
        finally:
            self._reactor.callFromThread(self._answered, Answer(asked_at, content))

    def _answered(self, answer: Answer[_T]) -> None:
        self._is_asking = False
        took = self._reactor.seconds() - self._asked_at
        self._next_at = self._asked_at + max(self._interval, min(REST * took, MAX_REST))
        self.latest = answer

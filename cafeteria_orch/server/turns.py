"""Long work of many connections: a piece now and then, in fair turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

ITERATIONS = 4
"""So many iterations of the reactor lie between two turns. A short frame takes two or three of
them, from its first bytes to its answer: it is to meet one long piece of work, not three."""


class Turns:
    """Hands out a turn every few iterations of the reactor.

    Between two turns the reactor sees to all sockets, so that who has little to do waits for
    one long piece of work at most, not for those of everybody.

    :param reactor: for the iterations.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._until_next = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self) -> bool:
        """Take the turn, if it is there to be taken."""
        if self._until_next:
            return False
        self._begin()
        return True

    def wait(self, call: Callable[[], None]) -> None:
        """Have something called when all that waited before has had its turn."""
        self._waiting.append(call)

    def _begin(self) -> None:
        self._until_next = ITERATIONS
        self._reactor.callLater(0, self._iterated)

    def _iterated(self) -> None:
        self._until_next -= 1
        if self._until_next:
            self._reactor.callLater(0, self._iterated)
        elif self._waiting:
            self._begin()
            self._waiting.popleft()()

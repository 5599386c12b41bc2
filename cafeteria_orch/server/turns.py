"""Long work of many connections: one piece at a time, in fair turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

ITERATIONS = 4
"""The number of the reactor's iterations from one turn to the next. A short frame takes two or
three of them from its first byte to its answer: it meets one long piece of work, not three."""


class Turns:
    """Gives a turn to one connection every few iterations of the reactor.

    Between two turns the reactor serves all sockets, so a connection with little to do waits for
    one long piece of work, not for one of each other connection. Twisted's ``Cooperator`` would
    make even a connection that is alone wait for its first turn.

    :param reactor: for the iterations.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._until_next = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self) -> bool:
        """Take the turn, if it is free; return whether it is taken."""
        if self._until_next:
            return False
        self._begin()
        return True

    def wait(self, call: Callable[[], None]) -> None:
        """Have a function called when those that waited before have had their turn."""
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

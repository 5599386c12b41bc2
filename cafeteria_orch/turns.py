"""Long work of many connections: a piece in each iteration of the reactor, in fair turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any


class Turns:
    """Hands out one turn in each iteration of the reactor.

    Between two turns the reactor sees to all sockets, so that who has little to do waits for
    one long piece of work at most, not for those of everybody.

    :param reactor: for the iterations.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._is_taken = False
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self) -> bool:
        """Take the turn of this iteration, if it is there to be taken."""
        if self._is_taken:
            return False
        self._is_taken = True
        self._reactor.callLater(0, self._pass_on)
        return True

    def wait(self, call: Callable[[], None]) -> None:
        """Have something called when all that waited before has had its turn."""
        self._waiting.append(call)

    def _pass_on(self) -> None:
        if not self._waiting:
            self._is_taken = False
            return
        self._reactor.callLater(0, self._pass_on)
        self._waiting.popleft()()

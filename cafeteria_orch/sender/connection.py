"""One connection of a delivery: its window of unanswered batches, the timeout of its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure

from .client import OrchestratorClient

ANSWER_TIMEOUT = 60.0
"""How long, in seconds, to wait for a server's next answer before the connection is aborted."""

_T = TypeVar("_T")


class Connection(TimeoutMixin):
    """One connection: its window of unanswered batches, and the timeout of its answers.

    :ivar try_again: whether the server has asked to send something again later.
    :ivar has_answered: whether the server has answered anything.
    """

    def __init__(self, reactor: Any, client: OrchestratorClient, window: int) -> None:
        self.client = client
        self.try_again = False
        self.has_answered = False
        self._reactor = reactor
        self._size = window
        self._window = DeferredSemaphore(window)
        self._failure: Failure | None = None
        self._expected = 0

    def callLater(self, period: float, func: Callable[[], object]) -> Any:
        """Have the reactor call something."""
        return self._reactor.callLater(period, func)

    def timeoutConnection(self) -> None:
        """Close at once: the server takes too long for an answer."""
        self.client.abortConnection()

    def expect(self, answer: Deferred[_T]) -> Deferred[_T]:
        """Give the server its time for an answer, from now or from the answer before it."""

        def came(result: _T) -> _T:
            self._expected -= 1
            self.setTimeout(ANSWER_TIMEOUT if self._expected else None)
            return result

        if not self._expected:
            self.setTimeout(ANSWER_TIMEOUT)
        self._expected += 1
        return answer.addBoth(came)

    async def reserve(self) -> None:
        """Wait for a place in the window.

        :raises ConnectionClosed: if the connection has ended.
        """
        await self._window.acquire()
        if self._failure is not None:
            self._window.release()
            self._failure.raiseException()

    async def settle(self) -> None:
        """Wait for all answers.

        :raises ConnectionClosed: if the connection has ended before.
        """
        for _ in range(self._size):
            await self._window.acquire()
        for _ in range(self._size):
            self._window.release()
        if self._failure is not None:
            self._failure.raiseException()

    def fail(self, failure: Failure) -> None:
        """Note that a batch got no answer, or that its answer could not be dealt with."""
        self._failure = failure

    def free(self, _: None) -> None:
        """Free a place in the window."""
        self._window.release()

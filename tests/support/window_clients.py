"""Clients that say who they are, and send again what was not acknowledged: a program of its own.

``python -m tests.support.window_clients PORT NAME...`` sends until its standard input ends, then
waits until all is acknowledged. It prints a line for each answer: the client's name, the index of
its batch, when it was sent first, when it was answered, and ``1`` for SUCCESS.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.task import deferLater, react

from cafeteria_orch.sender.client import Answer, OrchestratorClient
from cafeteria_orch.wire.messages import BatchRecvSuccess

from .senders import INTERVAL, ledger_batch

WINDOW = 8


class WindowClient:
    """One client.

    :param is_stopping: whether it sends no further batches.
    """

    def __init__(
        self, reactor: Any, port: int, name: str, is_stopping: Callable[[], bool]
    ) -> None:
        self._reactor = reactor
        self._endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
        self._name = name
        self._is_stopping = is_stopping
        self._client_id = uuid4()
        self._next = 0
        # The unacknowledged batches, and when each was sent first.
        self._pending: dict[int, float] = {}

    async def run(self) -> None:
        """Send over as many connections as it takes."""
        while self._pending or not self._is_stopping():
            try:
                client = await connectProtocol(self._endpoint, OrchestratorClient())
                await self._converse(client)
            except (ConnectError, ConnectionClosed):
                await self._pause(0.1)

    async def _converse(self, client: OrchestratorClient) -> None:
        await client.send_hello(self._client_id)
        for index in sorted(self._pending):
            self._send(client, index)
        while client.connected and (self._pending or not self._is_stopping()):
            if len(self._pending) < WINDOW and not self._is_stopping():
                self._pending[self._next] = time.monotonic()
                self._send(client, self._next)
                self._next += 1
            await self._pause(INTERVAL)
        if client.connected:
            await client.finish()

    def _send(self, client: OrchestratorClient, index: int) -> None:
        def answered(answer: Answer) -> None:
            sent = self._pending.pop(index)
            is_success = isinstance(answer, BatchRecvSuccess)
            print(self._name, index, sent, time.monotonic(), int(is_success), flush=True)

        answer = client.send_message(ledger_batch(self._name, index))
        # It is sent again over the next connection.
        answer.addCallbacks(answered, lambda _: None)

    async def _pause(self, seconds: float) -> None:
        await deferLater(self._reactor, seconds, lambda: None)


async def main(reactor: Any, port: str, *names: str) -> None:
    """Run them all."""
    stopping = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        stopping.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    clients = [WindowClient(reactor, int(port), name, stopping.is_set) for name in names]
    await gatherResults([Deferred.fromCoroutine(client.run()) for client in clients])


if __name__ == "__main__":
    react(main, sys.argv[1:])

"""A service with a real store and a real port that is stopped, and started again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.trial.unittest import TestCase

from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.observe.http import Monitor
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from tests.support.builders import SUCCESS, batch_frame
from tests.support.crowds import stored_batches


class Client(Protocol):
    """Sends a request; fires with the first bytes of what comes back."""

    def __init__(self, request: bytes, size: int) -> None:
        self.answer: Deferred[bytes] = Deferred()
        self._request = request
        self._size = size
        self._received = b""

    def connectionMade(self) -> None:
        self.transport.write(self._request)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        if len(self._received) >= self._size and not self.answer.called:
            self.answer.callback(self._received[: self._size])


class RestartTests(TestCase):
    """A service that starts again opens once more what it has closed."""

    timeout = 20

    def setUp(self) -> None:
        self.addCleanup(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))

    async def ask(self, port: Any, request: bytes, size: int) -> bytes:
        """Connect to a port, and return the first bytes of its answer."""
        client = Client(request, size)
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)
        await connectProtocol(endpoint, client)
        return await client.answer

    async def test_a_restart_stores_batches_again(self) -> None:
        """It listens, is ready, acknowledges what is on disk, and closes the store."""
        path = f"{self.mktemp()}.sqlite3"
        sink = Sink(reactor, SQLiteStore(path))
        factory = OrchestratorFactory(reactor)
        sink.register(factory)
        clients, operators = (TCP4ServerEndpoint(reactor, 0, 50, "127.0.0.1") for _ in range(2))
        monitor = Monitor(reactor, factory, operators, "0", sink=sink)
        service = OrchestratorService(reactor, factory, [clients], sink=sink, monitor=monitor)
        for number in range(1, 4):
            service.startService()
            ready = await self.ask(monitor._port, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", 15)
            self.assertEqual(ready, b"HTTP/1.1 200 OK")
            batch = batch_frame(batch_number=number)
            self.assertEqual(await self.ask(service._ports[0], batch, len(SUCCESS)), SUCCESS)
            await service.stopService()
            # The writer has closed its database: nothing is left ahead of the file.
            self.assertEqual(sink.sizes().wal, 0)
            self.assertEqual(len(stored_batches(Path(path))), number)

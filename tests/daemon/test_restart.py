"""A service with a real store and a real port that is stopped, and started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.trial.unittest import TestCase

from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.sink import Sink
from tests.support.builders import SUCCESS, batch_frame
from tests.support.crowds import stored_batches


class Client(Protocol):
    """Sends a batch; fires with the answer when it is whole."""

    def __init__(self, data: bytes) -> None:
        self.answer: Deferred[bytes] = Deferred()
        self._data = data
        self._received = b""

    def connectionMade(self) -> None:
        self.transport.write(self._data)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        if len(self._received) == len(SUCCESS):
            self.answer.callback(self._received)


class RestartTests(TestCase):
    """Everything that the service has opened is opened once more."""

    timeout = 20

    async def test_a_restart_stores_batches_again(self) -> None:
        """Each life listens on its port, acknowledges what is on disk, and closes the store."""
        path = f"{self.mktemp()}.sqlite3"
        sink = Sink(reactor, path)
        factory = OrchestratorFactory(reactor)
        sink.register(factory)
        endpoint: Any = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
        service = OrchestratorService(reactor, factory, [endpoint], sink=sink)
        for number in range(1, 4):
            service.startService()
            port: Any = service._ports[0]
            client = Client(batch_frame(batch_number=number))
            await connectProtocol(
                TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port), client
            )
            self.assertEqual(await client.answer, SUCCESS)
            await service.stopService()
            # The writer has closed its database: nothing is left ahead of the file.
            self.assertEqual(sink.sizes().wal, 0)
            self.assertEqual(len(stored_batches(Path(path))), number)

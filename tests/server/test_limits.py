"""How many connections there may be, and what the log says of those that were refused."""

from __future__ import annotations

import contextlib
from typing import Any

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.builders import SUCCESS, Pending, batch_frame, lose, texts
from tests.support.processes import HELLO, Client, ProcessTestCase, Server, wait_until

HERE = IPv4Address("TCP", "10.0.0.1", 1)
THERE = IPv4Address("TCP", "10.0.0.2", 1)
LOCAL = UNIXAddress("/run/cafeorch")


class LimitTests(SynchronousTestCase):
    """Which connections are admitted."""

    def setUp(self) -> None:
        self.clock = Clock()

    def factory(self, **limits: Any) -> OrchestratorFactory:
        return OrchestratorFactory(self.clock, **limits)

    def connect(
        self, factory: OrchestratorFactory, address: IAddress = HERE
    ) -> OrchestratorProtocol | None:
        protocol = factory.buildProtocol(address)
        if protocol is not None:
            protocol.makeConnection(StringTransport(peerAddress=address))
        return protocol

    def admitted(self, factory: OrchestratorFactory, *addresses: IAddress) -> list[bool]:
        """Whether each of some connections, one after the other, is made."""
        return [self.connect(factory, address) is not None for address in addresses]

    def test_no_limit(self) -> None:
        """A factory of a program of one's own has no limit unless it is given one."""
        self.assertNotIn(False, self.admitted(self.factory(), *[HERE] * 2000))

    def test_at_once(self) -> None:
        """So many at once are admitted, from wherever they come, and no more."""
        factory = self.factory(max_connections=3)
        admitted = self.admitted(factory, HERE, THERE, LOCAL, HERE, LOCAL)
        self.assertEqual(admitted, [True, True, True, False, False])
        self.assertEqual(len(factory.connections), 3)

    def test_of_one_host(self) -> None:
        """So many of one address; another, or a local socket, is not limited by that."""
        factory = self.factory(max_connections_per_host=2)
        admitted = self.admitted(factory, HERE, HERE, HERE, THERE, LOCAL, LOCAL, LOCAL)
        self.assertEqual(admitted, [True, True, False, True, True, True, True])

    def test_gone_makes_room(self) -> None:
        """For each that is gone one more is admitted."""
        factory = self.factory(max_connections=2, max_connections_per_host=1)
        for _ in range(3):
            protocol = self.connect(factory)
            assert protocol is not None
            self.assertEqual(self.admitted(factory, HERE), [False])
            lose(protocol)
        self.assertEqual(factory.connections, set())

    def test_gone_with_a_message_in_hand(self) -> None:
        """Who is gone takes up room until what came of it is done."""
        factory = self.factory(max_connections=1)
        pending = Pending()
        factory.register_processor(41, pending)
        protocol = self.connect(factory)
        assert protocol is not None
        protocol.dataReceived(protocol.encodeFrame(b"\x29"))
        lose(protocol)
        self.assertEqual(self.admitted(factory, HERE), [False])
        pending.finish()
        self.assertEqual(self.admitted(factory, HERE), [True])

    def test_one_line_a_minute(self) -> None:
        """The first that is refused is logged, then their number once a minute."""
        factory = self.factory(max_connections=1)
        with capturedLogs() as events:
            self.admitted(factory, *[HERE] * 100)
            self.clock.advance(REPORT_INTERVAL - 1)
            self.admitted(factory, HERE)
            self.clock.advance(1)
            self.admitted(factory, THERE)
        first, second = texts(events, LogLevel.warn)
        self.assertEqual(
            first,
            "action: accept_connections | result: refused | ip: 10.0.0.1 | refused: 1"
            " | error: 1 are open, the limit of --max-connections, or of descriptors",
        )
        self.assertIn("ip: 10.0.0.2 | refused: 100 |", second)

    def test_line_of_one_host(self) -> None:
        """The line says which limit it was."""
        factory = self.factory(max_connections_per_host=1)
        with capturedLogs() as events:
            self.admitted(factory, HERE, HERE)
        (line,) = texts(events, LogLevel.warn)
        self.assertIn("it has 1, the limit of --max-connections-per-host", line)


class ServerTests(ProcessTestCase):
    """A real server at its limit."""

    def test_closed_at_once(self) -> None:
        """One too many is closed, those before it are served, and its end makes room."""
        server = self.start("--store", "none", "--max-connections", "3")
        clients = [wait_until(lambda: self.admitted(server), "there is room") for _ in range(3)]
        for _ in range(50):
            self.assertIsNone(self.admitted(server))
        for client in clients:
            client.send(batch_frame())
            self.assertEqual(client.read(5), SUCCESS)
        clients.pop().close()
        wait_until(lambda: self.admitted(server), "there is room again")
        server.wait_until_logged("result: refused")
        self.assertEqual(server.log.count("result: refused"), 1)

    def admitted(self, server: Server) -> Client | None:
        """A client that is served, if one more is."""
        client = self.client(server)
        with contextlib.suppress(ConnectionError):
            client.send(HELLO)
            if client.read(5) == SUCCESS:
                return client
        client.close()
        return None

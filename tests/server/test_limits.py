"""The limits of connections, and what the log says of a connection that exceeds one."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import Logger, LogLevel, LogPublisher, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL
from cafeteria_orch.server import limits
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.builders import SUCCESS, Pending, batch_frame, frame, lose, texts
from tests.support.processes import HELLO, Client, ProcessTestCase, Server, wait_until

HERE = IPv4Address("TCP", "10.0.0.1", 1)
THERE = IPv4Address("TCP", "10.0.0.2", 1)
LOCAL = UNIXAddress("/run/cafeorch")


class Host(str):
    """An address of which a test can tell whether anything still holds it."""

    __slots__ = ("__weakref__",)


class LimitTests(SynchronousTestCase):
    """The factory admits connections up to its limits."""

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
        """Connect from each of some addresses in turn; whether each connection was admitted."""
        return [self.connect(factory, address) is not None for address in addresses]

    def test_a_factory_has_no_limit_by_default(self) -> None:
        """A program that makes its own factory sets limits only if it wants them."""
        self.assertNotIn(False, self.admitted(self.factory(), *[HERE] * 2000))

    def test_the_total_is_limited(self) -> None:
        """The limit counts the connections of all addresses together."""
        factory = self.factory(max_connections=3)
        admitted = self.admitted(factory, HERE, THERE, LOCAL, HERE, LOCAL)
        self.assertEqual(admitted, [True, True, True, False, False])
        self.assertEqual(len(factory.connections), 3)

    def test_the_connections_of_a_host_are_limited(self) -> None:
        """The limit of one address concerns neither another address nor a local socket."""
        factory = self.factory(max_connections_per_host=2)
        admitted = self.admitted(factory, HERE, HERE, HERE, THERE, LOCAL, LOCAL, LOCAL)
        self.assertEqual(admitted, [True, True, False, True, True, True, True])

    def test_a_lost_connection_makes_room(self) -> None:
        """When a connection is lost, the next one is admitted."""
        factory = self.factory(max_connections=2, max_connections_per_host=1)
        for _ in range(3):
            protocol = self.connect(factory)
            assert protocol is not None
            self.assertEqual(self.admitted(factory, HERE), [False])
            lose(protocol)
        self.assertEqual(factory.connections, set())

    def test_a_message_in_progress_takes_room(self) -> None:
        """A lost connection counts until its last message is processed."""
        factory = self.factory(max_connections=1)
        pending = Pending()
        factory.register_processor(41, pending)
        protocol = self.connect(factory)
        assert protocol is not None
        protocol.dataReceived(frame(b"\x29"))
        lose(protocol)
        self.assertEqual(self.admitted(factory, HERE), [False])
        pending.finish()
        self.assertEqual(self.admitted(factory, HERE), [True])

    def test_nothing_remembers_a_host_that_has_left(self) -> None:
        """A server that runs for years keeps no entry for each address that ever connected."""
        # A buffered line would hold the address that it names.
        self.patch(limits, "_log", Logger("test", observer=LogPublisher()))
        factory = self.factory(max_connections_per_host=1, log_level=LogLevel.error)
        self.admitted(factory, HERE, HERE)
        hosts = []
        for number in range(100):
            address = IPv4Address("TCP", Host(f"10.1.0.{number}"), 1)
            protocol = self.connect(factory, address)
            assert protocol is not None
            self.assertEqual(self.admitted(factory, address), [False])
            lose(protocol)
            hosts.append(weakref.ref(address.host))
        del address, protocol
        # The log knows some of them for a minute.
        self.clock.advance(REPORT_INTERVAL)
        gc.collect()
        self.assertEqual([host for host in hosts if host() is not None], [])

    def test_refusals_are_logged_once_a_minute(self) -> None:
        """The first refusal of a host is logged, then their number once a minute."""
        factory = self.factory(max_connections=1)
        with capturedLogs() as events:
            self.admitted(factory, *[HERE] * 100)
            self.clock.advance(REPORT_INTERVAL - 1)
            self.admitted(factory, HERE)
            self.admitted(factory, THERE)
            self.clock.advance(1)
        first, other, second = texts(events, LogLevel.warn)
        self.assertEqual(
            first,
            "action: accept_connections | result: refused | ip: 10.0.0.1 | refused: 1"
            " | error: 1 are open, the limit of --max-connections, or of descriptors",
        )
        self.assertIn("ip: 10.0.0.2 | refused: 1 |", other)
        self.assertIn("ip: 10.0.0.1 | refused: 99 |", second)

    def test_the_log_names_the_limit(self) -> None:
        """The line says which limit the connection exceeded."""
        factory = self.factory(max_connections_per_host=1)
        with capturedLogs() as events:
            self.admitted(factory, HERE, HERE)
        (line,) = texts(events, LogLevel.warn)
        self.assertIn("it has 1, the limit of --max-connections-per-host", line)


class ServerTests(ProcessTestCase):
    """A real server at its limit."""

    def test_a_connection_beyond_the_limit_is_closed_at_once(self) -> None:
        """The connections before it are served, and the end of one makes room."""
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
        """Connect one more client; ``None`` if the server does not serve it."""
        client = self.client(server)
        with contextlib.suppress(ConnectionError):
            client.send(HELLO)
            if client.read(5) == SUCCESS:
                return client
        client.close()
        return None

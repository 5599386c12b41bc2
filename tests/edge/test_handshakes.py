"""What a connection passes before it is a client: in memory, by the clock of the test."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from OpenSSL.SSL import Connection, Error
from OpenSSL.SSL import X509VerificationCodes as Codes
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL
from cafeteria_orch.edge.admission import HANDSHAKE_TIMEOUT, Gates
from cafeteria_orch.edge.proxy import parse_networks
from cafeteria_orch.edge.tls import ServerTLS, _note_mistrust, handshake_problem
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.builders import (
    ECHO,
    SUCCESS,
    Pending,
    TCPTransport,
    batch_frame,
    echo,
    numbered,
    texts,
)
from tests.support.certificates import (
    SERVER,
    Files,
    MemoryClient,
    authority,
    client_context,
    issue,
    old_context,
    pem,
)
from tests.support.processes import HELLO

from .test_proxy import V1, V2, version_2

BALANCER = IPv4Address("TCP", "10.0.0.1", 1)
ELSEWHERE = IPv4Address("TCP", "10.0.1.1", 1)
LOCAL = UNIXAddress("/run/cafeorch")
CLIENT = "192.0.2.7"
"""Of whom the headers are."""


class Wire(TCPTransport):
    """A transport as the reactor's are: whoever is its ``protocol`` gets what comes."""

    def __init__(self, protocol: Protocol, peer: IAddress) -> None:
        super().__init__()
        self.peerAddr = peer
        self.protocol: Any = protocol
        protocol.makeConnection(self)

    @property
    def is_closing(self) -> bool:
        """Whether this side has closed."""
        return bool(self.aborted or self.disconnecting)

    def lose(self, error: Exception | None = None) -> None:
        """It is gone."""
        self.protocol.connectionLost(Failure(error or ConnectionDone()))


class GatesTestCase(SynchronousTestCase):
    """Gates before a factory, on a clock."""

    most = 10

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock)
        self.factory.register_processor(ECHO, echo)

    def gates(self, **options: Any) -> Gates:
        """Gates that listen."""
        gates = Gates(self.clock, self.factory, most=self.most, **options)
        gates.doStart()
        return gates

    def connect(self, gates: Gates, peer: IAddress = BALANCER) -> Wire:
        """A connection that has said nothing yet."""
        protocol = gates.buildProtocol(peer)
        assert protocol is not None
        return Wire(protocol, peer)

    def client(self) -> OrchestratorProtocol:
        """The one client that there is."""
        (client,) = self.factory.connections
        return client

    def one_warning(self, events: list[LogEvent]) -> str:
        """The one line that was logged beyond what always is."""
        worse = [event for event in events if event["log_level"] > LogLevel.info]
        (line,) = texts(worse, LogLevel.warn)
        self.assertEqual(len(worse), 1)
        return line


class ProxyTests(GatesTestCase):
    """Behind a load balancer."""

    def proxied(self) -> Gates:
        """Gates that believe one balancer."""
        return self.gates(trusted=parse_networks("10.0.0.0/24"))

    def test_who_it_is(self) -> None:
        """The client of the header is the session's and the log's."""
        for header in (V1, V2):
            with capturedLogs() as events:
                wire = self.connect(self.proxied())
                wire.protocol.dataReceived(header)
            self.assertEqual(self.client().session.ip, CLIENT)
            self.assertIs(wire.protocol, self.client())
            accepted = f"action: accept_connections | result: success | ip: {CLIENT}"
            self.assertEqual(texts(events, LogLevel.info), [accepted])
            wire.lose()

    def test_every_split(self) -> None:
        """Wherever the header is cut off, and with messages in the same chunk."""
        for header in (V1, V2):
            said = header + HELLO + numbered(1)
            for cut in range(len(said) + 1):
                wire = self.connect(self.proxied())
                for part in (said[:cut], said[cut:]):
                    wire.protocol.dataReceived(part)
                self.assertEqual(wire.value(), SUCCESS + numbered(1), cut)
                self.assertEqual(self.client().session.ip, CLIENT)
                wire.lose()

    def test_byte_by_byte(self) -> None:
        """Nor do many cuts matter."""
        for header in (V1, V2):
            wire = self.connect(self.proxied())
            for byte in header + numbered(1, 2):
                wire.protocol.dataReceived(bytes([byte]))
            self.assertEqual(wire.value(), numbered(1, 2))
            wire.lose()

    def test_balancer_itself(self) -> None:
        """A check of the server's health, or a client that is unknown: the balancer's address."""
        for header in (b"PROXY UNKNOWN\r\n", version_2(command=0x20), version_2(0x00, b"")):
            wire = self.connect(self.proxied())
            wire.protocol.dataReceived(header)
            self.assertEqual(self.client().session.ip, BALANCER.host)
            wire.lose()

    def test_half_close(self) -> None:
        """A client that half-closes behind a balancer gets all that it is owed."""
        pending = Pending()
        self.factory.register_processor(41, pending)
        wire = self.connect(self.proxied())
        wire.protocol.dataReceived(V1 + b"\x00\x00\x00\x01\x29")
        wire.protocol.readConnectionLost()
        self.assertFalse(wire.is_closing)
        pending.finish()
        self.assertEqual(wire.value(), b"\x00\x00\x00\x01\x29")
        self.assertTrue(wire.disconnecting)

    def test_paused_from_the_start(self) -> None:
        """What comes with the header waits, if the store takes nothing at the moment."""
        self.factory.pauseProducing()
        wire = self.connect(self.proxied())
        wire.protocol.dataReceived(V1 + numbered(1))
        self.assertEqual(wire.value(), b"")
        self.factory.resumeProducing()
        self.assertEqual(wire.value(), numbered(1))

    def test_elsewhere(self) -> None:
        """Nobody but the balancer may connect: one line says so."""
        gates = self.proxied()
        with capturedLogs() as events:
            self.assertIsNone(gates.buildProtocol(ELSEWHERE))
            self.assertIsNone(gates.buildProtocol(ELSEWHERE))
        self.assertEqual(
            self.one_warning(list(events)),
            "action: handshake | result: fail | ip: 10.0.1.1 | error: it is not in --proxy-from"
            " | refused: 1",
        )
        self.assertEqual(self.factory.counters.failed_handshakes, 2)

    def test_local_socket(self) -> None:
        """A local socket is the machine's own: its headers are believed, and may say nothing."""
        for header, ip in ((V2, CLIENT), (b"PROXY UNKNOWN\r\n", "unix")):
            wire = self.connect(self.proxied(), LOCAL)
            wire.protocol.dataReceived(header)
            self.assertEqual(self.client().session.ip, ip)
            self.assertFalse(wire.no_delay)
            wire.lose()

    def test_no_header(self) -> None:
        """What begins with anything else is closed without a word."""
        with capturedLogs() as events:
            wire = self.connect(self.proxied())
            wire.protocol.dataReceived(HELLO)
        self.assertTrue(wire.aborted)
        self.assertEqual(wire.value(), b"")
        self.assertEqual(self.factory.connections, set())
        self.assertIn(
            "ip: 10.0.0.1 | error: PROXY header: there is no PROXY header",
            self.one_warning(list(events)),
        )

    def test_limit_of_a_host(self) -> None:
        """The limit of connections is the client's, not the balancer's."""
        self.factory = OrchestratorFactory(self.clock, max_connections_per_host=1)
        gates = self.proxied()
        first, second, other = (self.connect(gates) for _ in range(3))
        first.protocol.dataReceived(V1)
        with capturedLogs() as events:
            second.protocol.dataReceived(V2)
        self.assertIn(
            f"result: refused | ip: {CLIENT} | refused: 1 | error: it has 1",
            self.one_warning(list(events)),
        )
        self.assertTrue(second.disconnecting)
        other.protocol.dataReceived(b"PROXY TCP4 192.0.2.8 198.51.100.1 1 2\r\n")
        self.assertEqual(
            {client.session.ip for client in self.factory.connections}, {CLIENT, "192.0.2.8"}
        )

    def test_refused_is_given_up(self) -> None:
        """One that is turned away and does not go is closed for good, without a second line."""
        self.factory = OrchestratorFactory(self.clock, max_connections=1)
        gates = self.proxied()
        self.connect(gates).protocol.dataReceived(V1)
        wire = self.connect(gates)
        wire.protocol.dataReceived(V1)
        with capturedLogs() as events:
            self.clock.advance(HANDSHAKE_TIMEOUT)
        self.assertTrue(wire.aborted)
        self.assertEqual((list(events), gates.pending), ([], {}))


class PatienceTests(GatesTestCase):
    """How long, and how many, are waited for."""

    most = 3

    def setUp(self) -> None:
        super().setUp()
        self.gate = self.gates(trusted=parse_networks("0.0.0.0/0"))

    def test_timeout(self) -> None:
        """Who has not passed after ten seconds is closed, however much it trickles."""
        wire = self.connect(self.gate)
        with capturedLogs() as events:
            for byte in V1[:9]:
                self.clock.advance(1)
                wire.protocol.dataReceived(bytes([byte]))
            self.assertFalse(wire.is_closing)
            self.clock.advance(1)
        self.assertTrue(wire.aborted)
        self.assertIn("its handshake was not done in 10 s", self.one_warning(list(events)))

    def test_clients_are_not_limited(self) -> None:
        """Who has passed has all the time that clients have."""
        wire = self.connect(self.gate)
        wire.protocol.dataReceived(V1)
        self.clock.advance(HANDSHAKE_TIMEOUT)
        self.assertFalse(wire.is_closing)

    def test_nothing_left_behind(self) -> None:
        """Whatever becomes of a connection, it is forgotten, and no call is left."""
        wires = [self.connect(self.gate) for _ in range(3)]
        wires[0].protocol.dataReceived(V1)
        wires[1].protocol.dataReceived(b"x")
        wires[2].lose()
        wires[0].lose()
        wires[1].lose()
        self.assertEqual((self.gate.pending, self.clock.getDelayedCalls()), ({}, []))

    def test_oldest_makes_room(self) -> None:
        """Who has kept silent longest makes room for one more; clients do not."""
        client, *silent = (self.connect(self.gate) for _ in range(3))
        client.protocol.dataReceived(V1)
        silent.append(self.connect(self.gate))
        with capturedLogs() as events:
            honest = self.connect(self.gate)
            honest.protocol.dataReceived(V1 + numbered(1))
        self.assertEqual([wire.is_closing for wire in silent], [True, False, False])
        self.assertEqual(honest.value(), numbered(1))
        self.assertFalse(client.is_closing)
        self.assertIn("3 others came before", self.one_warning(list(events)))

    def test_one_line_a_minute(self) -> None:
        """Of each kind the first is logged, then their number once a minute."""
        with capturedLogs() as events:
            for said in (b"x", b"y", b"PROXY x\r\n", b"z"):
                self.connect(self.gate).protocol.dataReceived(said)
            self.clock.advance(REPORT_INTERVAL)
            self.connect(self.gate).protocol.dataReceived(b"x")
        lines = texts(list(events), LogLevel.warn)
        self.assertEqual([line.rpartition(" ")[2] for line in lines], ["1", "1", "3"])
        self.assertIn("the line is not as it has to be", lines[1])

    def test_gone_away(self) -> None:
        """Who goes away in the middle is worth a line, who never said anything is not."""
        with capturedLogs() as events:
            self.connect(self.gate).lose()
            self.assertEqual(list(events), [])
            wire = self.connect(self.gate)
            wire.protocol.dataReceived(b"PRO")
            wire.lose(ConnectionLost())
        self.assertIn("closed before its handshake", self.one_warning(list(events)))

    def test_drain(self) -> None:
        """When nothing listens any more, those who have not passed are closed; clients are not."""
        client, pending = self.connect(self.gate), self.connect(self.gate)
        client.protocol.dataReceived(V1)
        with capturedLogs() as events:
            self.gate.doStop()
        self.assertEqual((client.is_closing, pending.aborted), (False, True))
        self.assertEqual(list(events), [])

    def test_draining(self) -> None:
        """Who passes while the factory drains is closed."""
        wire = self.connect(self.gate)
        self.successResultOf(self.factory.drain())
        wire.protocol.dataReceived(V1)
        self.assertTrue(wire.disconnecting)


class TLSTests(GatesTestCase):
    """The TLS handshake."""

    def setUp(self) -> None:
        super().setUp()
        folder = Path(self.mktemp())
        folder.mkdir()
        self.files = Files(folder)
        # The certificates are valid now, and this clock begins with 1970.
        with capturedLogs():
            self.tls = ServerTLS(self.clock, self.files.cert)
            self.mutual = ServerTLS(self.clock, self.files.cert, client_ca=self.files.client_ca)

    def secure(self, context: ssl.SSLContext, **options: Any) -> tuple[Wire, MemoryClient]:
        """A connection by TLS, and who is at its other end."""
        wire = self.connect(self.gates(tls=self.tls, **options))
        return wire, MemoryClient(wire, context)

    def refused(self, context: ssl.SSLContext) -> str:
        """What the log says of a client whose handshake fails with client certificates asked for."""
        wire = self.connect(self.gates(tls=self.mutual))
        client = MemoryClient(wire, context)
        with capturedLogs() as events:
            try:
                client.handshake()
                # With TLS 1.3 a client learns only now that its certificate is not taken.
                self.assertRaises(ssl.SSLError, client.read)
            except ssl.SSLError:
                pass
            self.assertTrue(wire.disconnecting)
            wire.lose()
        self.assertEqual(self.factory.connections, set())
        line = self.one_warning(list(events))
        self.assertIn("action: handshake | result: fail | ip: 10.0.0.1 | error: ", line)
        return line.partition("error: ")[2].rpartition(" | refused: 1")[0]

    def test_conversation(self) -> None:
        """A client that trusts the server is served; the log says no more than of any other."""
        with capturedLogs() as events:
            wire, client = self.secure(client_context())
            client.handshake()
            client.send(HELLO + batch_frame())
            self.clock.advance(0)
        self.assertEqual(client.read(), SUCCESS * 2)
        self.assertIsNone(self.client().session.common_name)
        self.assertIn(
            "action: accept_connections | result: success | ip: 10.0.0.1",
            texts(list(events), LogLevel.info),
        )
        wire.lose()

    def test_chain(self) -> None:
        """The client gets what is between the certificate and the CA that it trusts."""
        between = authority("ours").create_child_ca()
        self.files.write("server.pem", pem(between.issue_cert(SERVER)))
        with capturedLogs():
            self.tls.reload()
        _, client = self.secure(client_context())
        client.handshake()
        self.assertEqual(len(self.factory.connections), 1)

    def test_client_after_the_handshake(self) -> None:
        """It is no client, and takes none of their room, before the handshake is done."""
        wire, client = self.secure(client_context())
        wire.protocol.dataReceived(client.hello())
        self.assertEqual(self.factory.connections, set())
        client.handshake()
        self.assertEqual(len(self.factory.connections), 1)
        self.assertTrue(wire.no_delay)

    def test_behind_a_balancer(self) -> None:
        """The header comes before TLS, in the same chunk or not; the client is the header's."""
        trusted = parse_networks("10.0.0.0/24")
        for header in (V1, V2):
            for together in (True, False):
                wire, client = self.secure(client_context(), trusted=trusted)
                if not together:
                    wire.protocol.dataReceived(header)
                client.handshake(header if together else b"")
                client.send(numbered(1))
                self.clock.advance(0)
                self.assertEqual(client.read(), numbered(1))
                self.assertEqual(self.client().session.ip, CLIENT)
                wire.lose()

    def test_failure_behind_a_balancer(self) -> None:
        """A handshake that fails is the client's, not the balancer's."""
        wire = self.connect(self.gates(tls=self.tls, trusted=parse_networks("10.0.0.0/24")))
        with capturedLogs() as events:
            wire.protocol.dataReceived(V1 + HELLO)
        self.assertIn(f"ip: {CLIENT} | error: it speaks no TLS", self.one_warning(list(events)))

    def test_common_name(self) -> None:
        """The name in the client's certificate is the session's and the log's."""
        wire = self.connect(self.gates(tls=self.mutual))
        with capturedLogs() as events:
            MemoryClient(wire, client_context(issue("agency-7"))).handshake()
        self.assertEqual(self.client().session.common_name, "agency-7")
        self.assertIn(
            "action: accept_connections | result: success | ip: 10.0.0.1 | common_name: agency-7",
            texts(list(events), LogLevel.info),
        )

    def test_hostile_common_name(self) -> None:
        """A name cannot begin a line, or a field, of its own."""
        for name, shown in (
            ("a\naction: stop | ip: 1", r"a\x0aaction: stop \x7c ip: 1"),
            ("\x1b[2J\r\u2028", r"\x1b[2J\x0d\u2028"),
            ("café\\n", r"café\x5cn"),
        ):
            wire = self.connect(self.gates(tls=self.mutual))
            MemoryClient(wire, client_context(issue(name))).handshake()
            self.assertEqual(self.client().session.common_name, shown)
            wire.lose()

    def test_no_common_name(self) -> None:
        """A certificate that names nobody, or whose name is broken, is good enough."""
        nameless = authority("ours").issue_cert(SERVER)
        for certificate in (nameless, issue()):
            wire = self.connect(self.gates(tls=self.mutual))
            MemoryClient(wire, client_context(certificate)).handshake()
            self.assertIsNone(self.client().session.common_name)
            wire.lose()
            self.patch(Connection, "get_peer_certificate", Mock(side_effect=ValueError))

    def test_not_yet_valid(self) -> None:
        """One whose certificate is not valid yet."""
        start = datetime.now(timezone.utc) + timedelta(days=1)
        certificate = authority("ours").issue_cert(SERVER, not_before=start)
        problem = self.refused(client_context(certificate))
        self.assertEqual(problem, "its certificate, or the CA's, is not valid yet")

    def test_other_mistrust(self) -> None:
        """Whatever else OpenSSL has against a certificate has its number."""
        wire = self.connect(self.gates(tls=self.mutual))
        MemoryClient(wire, client_context(issue())).handshake()
        connection = wire.protocol.getHandle()
        self.assertFalse(_note_mistrust(connection, None, Codes.ERR_INVALID_PURPOSE, 0, 0))
        failure = Failure(Error([]))
        self.assertIn("(verification error 26)", str(handshake_problem(failure, connection)))

    def test_no_certificate(self) -> None:
        """A client that shows none, where one is required."""
        self.assertEqual(self.refused(client_context()), "it has shown no certificate")

    def test_wrong_authority(self) -> None:
        """One whose certificate is of another CA."""
        problem = self.refused(client_context(issue(ca="theirs")))
        self.assertEqual(problem, "its certificate is of no CA in --tls-client-ca")

    def test_expired(self) -> None:
        """One whose certificate has expired."""
        problem = self.refused(client_context(issue(days=-1)))
        self.assertEqual(problem, "its certificate, or the CA's, has expired")

    def test_server_is_not_trusted(self) -> None:
        """A client that does not trust the server says why it goes."""
        problem = self.refused(client_context(issue(), trusted="theirs"))
        self.assertEqual(problem, "it refuses this server: unknown ca")

    def test_too_old(self) -> None:
        """TLS 1.1 is not spoken."""
        self.assertEqual(self.refused(old_context()), "it speaks no TLS from version 1.2 on")

    def test_plain_text(self) -> None:
        """Who speaks no TLS is closed without a word, of ours or of TLS."""
        for said in (HELLO, numbered(1), b"GET / HTTP/1.1\r\n", b"\x1e"):
            with capturedLogs() as events:
                wire = self.connect(self.gates(tls=self.tls))
                wire.protocol.dataReceived(said)
            self.assertTrue(wire.aborted)
            self.assertEqual(wire.value(), b"")
            self.assertIn("error: it speaks no TLS |", self.one_warning(list(events)))

    def test_nonsense(self) -> None:
        """Nor does what only begins like TLS do any harm."""
        with capturedLogs() as events:
            wire = self.connect(self.gates(tls=self.tls))
            wire.protocol.dataReceived(b"\x16" * 1000)
            wire.lose()
        self.assertIn("error: no TLS: ", self.one_warning(list(events)))

    def test_silence(self) -> None:
        """Ten seconds are for the whole handshake, and nothing is logged of it twice."""
        wire, client = self.secure(client_context())
        self.clock.advance(HANDSHAKE_TIMEOUT - 1)
        wire.protocol.dataReceived(client.hello())
        self.assertFalse(wire.is_closing)
        with capturedLogs() as events:
            self.clock.advance(1)
            self.assertTrue(wire.aborted)
            wire.lose(ConnectionLost())
        self.assertIn("not done in 10 s", self.one_warning(list(events)))

    def test_gone_in_the_middle(self) -> None:
        """A client that goes away in the middle of its handshake."""
        wire, client = self.secure(client_context())
        with capturedLogs() as events:
            wire.protocol.dataReceived(client.hello())
            wire.lose()
        self.assertIn("closed before its handshake", self.one_warning(list(events)))

    def test_one_too_many(self) -> None:
        """One more than the limit is closed after its handshake, as TLS closes."""
        self.factory = OrchestratorFactory(self.clock, max_connections=0)
        wire, client = self.secure(client_context())
        with capturedLogs() as events:
            client.handshake()
            self.assertTrue(wire.disconnecting)
            self.assertEqual(client.read(), b"")
            wire.lose()
        self.assertIn("the limit of --max-connections", self.one_warning(list(events)))

    def test_closed_without_a_word(self) -> None:
        """A client that closes its connection, but not TLS, is worth a line only amid a frame."""
        for said, lines in ((HELLO, 0), (HELLO[:-1], 1)):
            wire, client = self.secure(client_context())
            client.handshake()
            client.send(said)
            with capturedLogs() as events:
                wire.lose()
            self.assertEqual(len(texts(list(events), LogLevel.warn)), lines)
        self.assertIn("connection closed, 1 bytes", texts(list(events), LogLevel.warn)[0])

    def test_abort_of_who_is_gone(self) -> None:
        """A drain that is given up does not stumble over a client that left a message in hand."""
        pending = Pending()
        self.factory.register_processor(41, pending)
        wire, client = self.secure(client_context())
        client.handshake()
        client.send(b"\x00\x00\x00\x01\x29")
        wire.lose(ConnectionLost())
        self.factory.abort()
        pending.finish()
        self.assertEqual(self.factory.connections, set())

    def test_reloaded(self) -> None:
        """New connections get the new certificate; one in the middle of its handshake, the old."""
        wire, client = self.secure(client_context())
        wire.protocol.dataReceived(client.hello())
        self.files.write("server.pem", b"none any more")
        with capturedLogs():
            self.tls.reload()
        client.handshake()
        client.send(numbered(1))
        self.clock.advance(0)
        self.assertEqual(client.read(), numbered(1))

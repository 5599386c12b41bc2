"""Admission by the PROXY header: who becomes a client, when, and how many may be pending."""

from __future__ import annotations

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionLost
from twisted.logger import LogLevel, capturedLogs

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL
from cafeteria_orch.edge.admission import ADMISSION_TIMEOUT
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.admission import (
    BALANCER,
    BALANCERS,
    CLIENT,
    V1,
    V2,
    AdmissionTestCase,
    Wire,
    version_2,
)
from tests.support.builders import SUCCESS, Pending, numbered, texts
from tests.support.processes import HELLO

ELSEWHERE = IPv4Address("TCP", "10.0.1.1", 1)
LOCAL = UNIXAddress("/run/cafeorch")


class ProxyTests(AdmissionTestCase):
    """A load balancer says in a PROXY header who its client is."""

    def proxied(self) -> Wire:
        """A connection of the balancer that has sent nothing yet."""
        return self.connect(self.admission(trusted=BALANCERS))

    def test_session_and_log_have_the_address_of_the_header(self) -> None:
        """The client takes the place of what read the header, with the header's address."""
        for header in (V1, V2):
            with capturedLogs() as events:
                wire = self.proxied()
                wire.deliver(header)
            self.assertEqual(self.client().session.ip, CLIENT)
            self.assertIs(wire.protocol, self.client())
            accepted = f"action: accept_connections | result: success | ip: {CLIENT}"
            self.assertEqual(texts(events, LogLevel.info), [accepted])
            wire.lose()

    def test_every_split_gives_the_same(self) -> None:
        """The header may be cut anywhere, and messages may follow in the same chunk."""
        for header in (V1, V2):
            sent = header + HELLO + numbered(1)
            splits = [(sent[:cut], sent[cut:]) for cut in range(len(sent) + 1)]
            for parts in (*splits, tuple(bytes([byte]) for byte in sent)):
                wire = self.proxied()
                for part in parts:
                    wire.deliver(part)
                self.assertEqual(wire.value(), SUCCESS + numbered(1), parts)
                self.assertEqual(self.client().session.ip, CLIENT)
                wire.lose()

    def test_without_an_address_the_client_has_the_balancers(self) -> None:
        """A health check, or a client that the balancer does not know, has its address."""
        for header in (b"PROXY UNKNOWN\r\n", version_2(command=0x20), version_2(0x00, b"")):
            wire = self.proxied()
            wire.deliver(header)
            self.assertEqual(self.client().session.ip, BALANCER.host)
            wire.lose()

    def test_half_close_reaches_the_client(self) -> None:
        """A client that half-closes behind a balancer gets every answer that it is owed."""
        pending = Pending()
        self.factory.register_processor(41, pending)
        wire = self.proxied()
        wire.deliver(V1 + b"\x00\x00\x00\x01\x29")
        wire.protocol.readConnectionLost()
        self.assertFalse(wire.is_closing)
        pending.finish()
        self.assertEqual(wire.value(), b"\x00\x00\x00\x01\x29")
        self.assertTrue(wire.disconnecting)

    def test_backpressure_holds_what_follows_the_header(self) -> None:
        """A frame that came with the header waits while the store takes nothing."""
        self.factory.pauseProducing()
        wire = self.proxied()
        wire.deliver(V1 + numbered(1))
        self.assertEqual(wire.value(), b"")
        self.factory.resumeProducing()
        self.assertEqual(wire.value(), numbered(1))

    def test_only_balancers_may_connect(self) -> None:
        """A connection from elsewhere is closed; the log has one line."""
        admission = self.admission(trusted=BALANCERS)
        with capturedLogs() as events:
            self.assertIsNone(admission.buildProtocol(ELSEWHERE))
            self.assertIsNone(admission.buildProtocol(ELSEWHERE))
        self.assertEqual(
            self.one_warning(list(events)),
            "action: handshake | result: fail | ip: 10.0.1.1 | error: it is not in --proxy-from"
            " | refused: 1",
        )
        self.assertEqual(self.factory.counters.failed_handshakes, 2)

    def test_a_local_socket_is_trusted(self) -> None:
        """A header that comes by a local socket is believed, and may name no address."""
        for header, ip in ((V2, CLIENT), (b"PROXY UNKNOWN\r\n", "unix")):
            wire = self.connect(self.admission(trusted=BALANCERS), LOCAL)
            wire.deliver(header)
            self.assertEqual(self.client().session.ip, ip)
            self.assertFalse(wire.no_delay)
            wire.lose()

    def test_without_a_header_nothing_is_answered(self) -> None:
        """A connection that begins with anything else is closed without a byte."""
        with capturedLogs() as events:
            wire = self.proxied()
            wire.deliver(HELLO)
        self.assertTrue(wire.aborted)
        self.assertEqual(wire.value(), b"")
        self.assertEqual(self.factory.connections, set())
        self.assertIn(
            "ip: 10.0.0.1 | error: PROXY header: there is no PROXY header",
            self.one_warning(list(events)),
        )

    def test_limit_of_a_host_counts_clients(self) -> None:
        """The limit of one address concerns the client's, not the balancer's."""
        self.factory = OrchestratorFactory(self.clock, max_connections_per_host=1)
        first, second, other = self.proxied(), self.proxied(), self.proxied()
        first.deliver(V1)
        with capturedLogs() as events:
            second.deliver(V2)
        self.assertIn(
            f"result: refused | ip: {CLIENT} | refused: 1 | error: it has 1",
            self.one_warning(list(events)),
        )
        self.assertTrue(second.disconnecting)
        other.deliver(b"PROXY TCP4 192.0.2.8 198.51.100.1 1 2\r\n")
        self.assertEqual(
            {client.session.ip for client in self.factory.connections}, {CLIENT, "192.0.2.8"}
        )

    def test_a_refused_client_that_does_not_go_is_aborted(self) -> None:
        """The timeout of admission ends its close, without a second line in the log."""
        self.factory = OrchestratorFactory(self.clock, max_connections=0)
        admission = self.admission(trusted=BALANCERS)
        wire = self.connect(admission)
        wire.deliver(V1)
        with capturedLogs() as events:
            self.clock.advance(ADMISSION_TIMEOUT)
        self.assertTrue(wire.aborted)
        self.assertEqual((list(events), admission.pending), ([], {}))


class BoundsTests(AdmissionTestCase):
    """Admission bounds how long, and how many, connections are pending."""

    max_pending = 3

    def setUp(self) -> None:
        super().setUp()
        self.admitting = self.admission(trusted=BALANCERS)

    def test_a_trickle_does_not_prolong_the_timeout(self) -> None:
        """A connection has ten seconds, however many bytes of its header come one by one."""
        wire = self.connect(self.admitting)
        with capturedLogs() as events:
            for byte in V1[:9]:
                self.clock.advance(1)
                wire.deliver(bytes([byte]))
            self.assertFalse(wire.is_closing)
            self.clock.advance(1)
        self.assertTrue(wire.aborted)
        self.assertIn("did not finish its handshake in 10 s", self.one_warning(list(events)))

    def test_the_timeout_does_not_concern_clients(self) -> None:
        """A client that was admitted has the timeouts of clients alone."""
        wire = self.connect(self.admitting)
        wire.deliver(V1)
        self.clock.advance(ADMISSION_TIMEOUT)
        self.assertFalse(wire.is_closing)

    def test_nothing_remembers_a_connection_that_has_ended(self) -> None:
        """Neither an entry nor a delayed call is left, however a connection ends."""
        admitted, refused, silent = (self.connect(self.admitting) for _ in range(3))
        admitted.deliver(V1)
        refused.deliver(b"x")
        for wire in (silent, admitted, refused):
            wire.lose()
        self.assertEqual((self.admitting.pending, self.clock.getDelayedCalls()), ({}, []))

    def test_the_oldest_pending_connection_makes_room(self) -> None:
        """One more connection closes the one that was silent longest, and no client."""
        client, *silent = (self.connect(self.admitting) for _ in range(3))
        client.deliver(V1)
        silent.append(self.connect(self.admitting))
        with capturedLogs() as events:
            honest = self.connect(self.admitting)
            honest.deliver(V1 + numbered(1))
        self.assertEqual([wire.is_closing for wire in silent], [True, False, False])
        self.assertEqual(honest.value(), numbered(1))
        self.assertFalse(client.is_closing)
        self.assertIn("3 others came before it", self.one_warning(list(events)))

    def test_each_problem_is_logged_once_a_minute(self) -> None:
        """The first failure of each kind is logged, then their number after a minute."""
        with capturedLogs() as events:
            for sent in (b"x", b"y", b"PROXY x\r\n", b"z"):
                self.connect(self.admitting).deliver(sent)
            self.clock.advance(REPORT_INTERVAL)
        lines = texts(list(events), LogLevel.warn)
        self.assertEqual([line.rpartition(" ")[2] for line in lines], ["1", "1", "2"])
        self.assertIn("the line is malformed", lines[1])

    def test_a_health_check_is_not_logged(self) -> None:
        """A close amid the header is worth a line; a close before the first byte is not."""
        with capturedLogs() as events:
            self.connect(self.admitting).lose()
            self.assertEqual(list(events), [])
            wire = self.connect(self.admitting)
            wire.deliver(b"PRO")
            wire.lose(ConnectionLost())
        self.assertIn("closed before it finished", self.one_warning(list(events)))

    def test_the_end_of_listening_closes_pending_connections(self) -> None:
        """The drain closes connections that are not clients yet, without a line."""
        client, pending = self.connect(self.admitting), self.connect(self.admitting)
        client.deliver(V1)
        with capturedLogs() as events:
            self.admitting.doStop()
        self.assertEqual((client.is_closing, pending.aborted), (False, True))
        self.assertEqual(list(events), [])

    def test_nobody_is_admitted_during_the_drain(self) -> None:
        """A connection that finishes its header while the factory drains is closed."""
        wire = self.connect(self.admitting)
        self.successResultOf(self.factory.drain())
        wire.deliver(V1)
        self.assertTrue(wire.disconnecting)

"""Admission by the TLS handshake, in memory and on a clock."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from OpenSSL.SSL import Connection, Error
from OpenSSL.SSL import X509VerificationCodes as Codes
from twisted.internet.error import ConnectionLost
from twisted.logger import LogLevel, capturedLogs
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from cafeteria_orch.edge.admission import ADMISSION_TIMEOUT
from cafeteria_orch.edge.agencies import Agencies
from cafeteria_orch.edge.tls import ServerTLS, _note_distrust, handshake_problem
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.admission import BALANCERS, CLIENT, V1, V2, AdmissionTestCase, Wire
from tests.support.builders import SUCCESS, Pending, batch_frame, numbered, texts
from tests.support.certificates import (
    AGENCY,
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


class HandshakeTestCase(AdmissionTestCase):
    """Admission by TLS, with or without client certificates."""

    def setUp(self) -> None:
        super().setUp()
        folder = Path(self.mktemp())
        folder.mkdir()
        self.files = Files(folder)

        def now() -> float:
            return datetime.now(timezone.utc).timestamp()

        self.tls = ServerTLS(now, self.files.cert)
        self.mutual = ServerTLS(now, self.files.cert, client_ca=self.files.client_ca)

    def secure(self, context: ssl.SSLContext, **options: Any) -> tuple[Wire, MemoryClient]:
        """A connection that may begin TLS, and its peer."""
        wire = self.connect(self.admission(**{"tls": self.tls, **options}))
        return wire, MemoryClient(wire, context)


class AdmittedTests(HandshakeTestCase):
    """A connection whose handshake succeeds becomes a client."""

    def test_messages_and_answers_go_by_tls(self) -> None:
        """The client is served, and logged as any other."""
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

    def test_the_chain_of_the_certificate_is_sent(self) -> None:
        """The client gets the certificates between the server's and the CA that it trusts."""
        between = authority("ours").create_child_ca()
        self.files.write("server.pem", pem(between.issue_cert(SERVER)))
        with capturedLogs():
            self.tls.reload()
        _, client = self.secure(client_context())
        client.handshake()
        self.assertEqual(len(self.factory.connections), 1)

    def test_the_client_exists_after_the_handshake(self) -> None:
        """Before that, the connection does not count as a client."""
        wire, client = self.secure(client_context())
        wire.deliver(client.hello())
        self.assertEqual(self.factory.connections, set())
        client.handshake()
        self.assertEqual(len(self.factory.connections), 1)
        self.assertTrue(wire.no_delay)

    def test_the_client_takes_the_place_of_the_candidate(self) -> None:
        """Nothing stands between TLS and the client's protocol, so no chunk costs a call more."""
        wire, client = self.secure(client_context())
        client.handshake()
        self.assertIs(wire.protocol.wrappedProtocol, self.client())

    def test_the_header_comes_before_tls(self) -> None:
        """The client is the header's, whatever chunks the header and the handshake come in."""
        for header in (V1, V2):
            hello = len(header) + 1
            for cut in (0, 1, len(header) - 1, len(header), hello, hello + 4, hello + 100):
                wire, client = self.secure(client_context(), trusted=BALANCERS)
                client.handshake(header, cut)
                client.send(numbered(1))
                self.clock.advance(0)
                self.assertEqual(client.read(), numbered(1), cut)
                self.assertEqual(self.client().session.ip, CLIENT)
                wire.lose()

    def test_a_handshake_may_come_byte_by_byte(self) -> None:
        """The header and the whole handshake may come in chunks of one byte."""
        wire, client = self.secure(client_context(), trusted=BALANCERS)
        deliver = wire.deliver
        self.patch(wire, "deliver", lambda data: [deliver(bytes([byte])) for byte in data])
        client.handshake(V2)
        client.send(numbered(1))
        self.clock.advance(0)
        self.assertEqual(client.read(), numbered(1))

    def test_frames_may_come_with_the_end_of_the_handshake(self) -> None:
        """Messages in the chunk that finishes the handshake are processed."""
        wire, client = self.secure(client_context())
        client.handshake(with_end=numbered(1, 2))
        self.clock.advance(0)
        self.assertEqual(client.read(), numbered(1, 2))
        wire.lose()

    def test_the_session_has_the_common_name(self) -> None:
        """The common name of the client's certificate stands in the session and in the log."""
        _, client = self.secure(client_context(issue("agency-7")), tls=self.mutual)
        with capturedLogs() as events:
            client.handshake()
        self.assertEqual(self.client().session.common_name, "agency-7")
        self.assertIn(
            "action: accept_connections | result: success | ip: 10.0.0.1 | common_name: agency-7",
            texts(list(events), LogLevel.info),
        )

    def test_a_common_name_is_escaped(self) -> None:
        """A name can begin neither a line of the log nor a field of it."""
        for name, shown in (
            ("a\naction: stop | ip: 1", r"a\x0aaction: stop \x7c ip: 1"),
            ("\x1b[2J\r\u2028", r"\x1b[2J\x0d\u2028"),
            ("café\\n", r"café\x5cn"),
        ):
            wire, client = self.secure(client_context(issue(name)), tls=self.mutual)
            client.handshake()
            self.assertEqual(self.client().session.common_name, shown)
            wire.lose()

    def test_a_certificate_needs_no_common_name(self) -> None:
        """A certificate without a common name, or with a broken one, is accepted."""
        nameless = authority("ours").issue_cert(SERVER)
        for certificate in (nameless, issue()):
            wire, client = self.secure(client_context(certificate), tls=self.mutual)
            client.handshake()
            self.assertIsNone(self.client().session.common_name)
            wire.lose()
            self.patch(Connection, "get_peer_certificate", Mock(side_effect=ValueError))

    def test_a_close_without_the_end_of_tls_is_no_fault(self) -> None:
        """A client that closes the connection, but not TLS, is logged only amid a frame."""
        for sent, lines in ((HELLO, 0), (HELLO[:-1], 1)):
            wire, client = self.secure(client_context())
            client.handshake()
            client.send(sent)
            with capturedLogs() as events:
                wire.lose()
            self.assertEqual(len(texts(list(events), LogLevel.warn)), lines)
        self.assertIn("connection closed, 1 bytes", texts(list(events), LogLevel.warn)[0])

    def test_frames_read_before_the_close_are_processed(self) -> None:
        """A client that closes TLS loses no frame that the server has read, but not processed."""
        pending, processed = Pending(), []
        self.factory.register_processor(41, pending)
        self.factory.register_processor(42, lambda message, _: processed.append(message))
        wire, client = self.secure(client_context())
        client.handshake()
        client.send(b"\x00\x00\x00\x01\x29" + b"\x00\x00\x00\x01\x2a" * 2)
        client.close()
        wire.lose()
        pending.finish()
        self.assertEqual(len(processed), 2)
        self.assertEqual(self.factory.connections, set())

    def test_a_lost_client_can_be_aborted(self) -> None:
        """The end of a drain aborts a client that is lost, but has a message in progress."""
        pending = Pending()
        self.factory.register_processor(41, pending)
        wire, client = self.secure(client_context())
        client.handshake()
        client.send(b"\x00\x00\x00\x01\x29")
        wire.lose(ConnectionLost())
        self.factory.abort()
        pending.finish()
        self.assertEqual(self.factory.connections, set())

    def test_a_reload_concerns_connections_to_come(self) -> None:
        """A handshake that has begun goes on with the certificate that it began with."""
        wire, client = self.secure(client_context())
        wire.deliver(client.hello())
        self.files.write("server.pem", b"not a certificate")
        with capturedLogs():
            self.tls.reload()
        client.handshake()
        client.send(numbered(1))
        self.clock.advance(0)
        self.assertEqual(client.read(), numbered(1))


class RefusedTests(HandshakeTestCase):
    """A connection whose handshake fails never reaches the factory; the log says why."""

    def test_certificates_that_are_refused(self) -> None:
        """The log names what is wrong with a client's certificate, or with ours for the client."""
        tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
        for context, problem in (
            (client_context(), "it showed no certificate"),
            (client_context(issue(ca="theirs")), "its certificate is of no CA in --tls-client-ca"),
            (client_context(issue(days=-1)), "its certificate, or the CA's, has expired"),
            (
                client_context(authority("ours").issue_cert(SERVER, not_before=tomorrow)),
                "its certificate, or the CA's, is not valid yet",
            ),
            (client_context(issue(), trusted="theirs"), "it refuses this server: unknown ca"),
            (old_context(), "it does not speak TLS 1.2 or newer"),
        ):
            self.assertEqual(self.problem(context), problem)

    def problem(self, context: ssl.SSLContext) -> str:
        """Fail a handshake with client certificates; the error that the log has."""
        wire, client = self.secure(context, tls=self.mutual)
        with capturedLogs() as events:
            try:
                client.handshake()
                # A client of TLS 1.3 learns only now that its certificate is refused.
                self.assertRaises(ssl.SSLError, client.read)
            except ssl.SSLError:
                pass
            self.assertTrue(wire.disconnecting)
            wire.lose()
        self.assertEqual(self.factory.connections, set())
        line = self.one_warning(list(events))
        self.assertIn("action: handshake | result: fail | ip: 10.0.0.1 | error: ", line)
        return line.partition("error: ")[2].rpartition(" | refused: 1")[0]

    def test_other_distrust_has_the_number_of_openssl(self) -> None:
        """A reason that has no text of its own is logged by its number."""
        wire, client = self.secure(client_context(issue()), tls=self.mutual)
        client.handshake()
        connection = wire.protocol.getHandle()
        self.assertFalse(_note_distrust(connection, None, Codes.ERR_INVALID_PURPOSE, 0, 0))
        failure = Failure(Error([]))
        self.assertIn("(verification error 26)", str(handshake_problem(failure, connection)))

    def test_plain_text_is_told_by_its_first_byte(self) -> None:
        """A client without TLS is closed without a byte of ours, and without memory for TLS."""
        self.patch(TLSMemoryBIOProtocol, "makeConnection", Mock(side_effect=AssertionError))
        for sent in (HELLO, numbered(1), b"GET / HTTP/1.1\r\n", b"\x1e"):
            self.factory.rate_limits.stop()
            wire, _ = self.secure(client_context())
            with capturedLogs() as events:
                wire.deliver(sent)
            self.assertTrue(wire.aborted)
            self.assertEqual(wire.value(), b"")
            self.assertIn("error: it does not speak TLS |", self.one_warning(list(events)))

    def test_plain_text_behind_a_balancer_is_the_clients(self) -> None:
        """The line about a failed handshake has the client's address, not the balancer's."""
        wire, _ = self.secure(client_context(), trusted=BALANCERS)
        with capturedLogs() as events:
            wire.deliver(V1 + HELLO)
        self.assertIn(f"ip: {CLIENT} | error: it does not speak", self.one_warning(list(events)))

    def test_what_only_begins_like_tls_is_refused(self) -> None:
        """Bytes that are no handshake fail as OpenSSL says."""
        wire, _ = self.secure(client_context())
        with capturedLogs() as events:
            wire.deliver(b"\x16" * 1000)
            wire.lose()
        self.assertIn("error: TLS failed: ", self.one_warning(list(events)))

    def test_a_silent_connection_takes_no_memory_for_tls(self) -> None:
        """TLS begins with the first byte behind the header."""
        self.patch(TLSMemoryBIOProtocol, "makeConnection", Mock(side_effect=AssertionError))
        wire, _ = self.secure(client_context(), trusted=BALANCERS)
        wire.deliver(V1)
        self.assertFalse(wire.TLS)
        self.assertEqual(len(self.factory.connections), 0)

    def test_the_timeout_includes_the_handshake(self) -> None:
        """A handshake that stalls is closed after ten seconds in all, with one line."""
        wire, client = self.secure(client_context())
        self.clock.advance(ADMISSION_TIMEOUT - 1)
        wire.deliver(client.hello())
        self.assertFalse(wire.is_closing)
        with capturedLogs() as events:
            self.clock.advance(1)
            self.assertTrue(wire.aborted)
            wire.lose(ConnectionLost())
        self.assertIn("did not finish its handshake", self.one_warning(list(events)))

    def test_a_close_amid_the_handshake_is_logged(self) -> None:
        """The client closed, and nothing was wrong with its handshake so far."""
        wire, client = self.secure(client_context())
        with capturedLogs() as events:
            wire.deliver(client.hello())
            wire.lose()
        self.assertIn("closed before it finished", self.one_warning(list(events)))

    def test_a_client_beyond_the_limit_is_closed_by_tls(self) -> None:
        """The limit of clients closes TLS in order, and drops what the client sent with it."""
        self.factory = OrchestratorFactory(self.clock, max_connections=0)
        admission = self.admission(tls=self.tls)
        wire = self.connect(admission)
        client = MemoryClient(wire, client_context())
        with capturedLogs() as events:
            client.handshake(with_end=HELLO * 100)
            self.assertTrue(wire.disconnecting)
            self.assertEqual(client.read(), b"")
            wire.lose()
        self.assertIn("the limit of --max-connections", self.one_warning(list(events)))
        self.assertEqual((admission.pending, self.clock.getDelayedCalls()), ({}, []))


class AgencyTests(HandshakeTestCase):
    """With ``--agencies``, a client's certificate says of which agency it is."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.files.write("agencies", f"{AGENCY} = 7\n".encode())
        self.agencies = Agencies(self.path)

    def arrive(self, name: str = AGENCY, **options: Any) -> tuple[Wire, MemoryClient]:
        """Do the handshake of a client with a certificate."""
        wire, client = self.secure(
            client_context(issue(name)), tls=self.mutual, agencies=self.agencies, **options
        )
        client.handshake(with_end=HELLO)
        return wire, client

    def test_a_listed_client_has_its_agency_from_the_start(self) -> None:
        """It is known before the client has said anything, and is certified."""
        self.arrive()
        session = self.client().session
        self.assertEqual((session.common_name, session.agency_id), (AGENCY, 7))
        self.assertTrue(session.is_certified)

    def test_a_client_that_is_not_listed_is_refused(self) -> None:
        """It is closed in order, without an answer to what it sent, logged and counted."""
        nameless = authority("ours").issue_cert(SERVER)
        for certificate, shown in ((issue("cafe|9"), r"cafe\x7c9"), (nameless, "-")):
            self.factory = OrchestratorFactory(self.clock)
            admission = self.admission(tls=self.mutual, agencies=self.agencies)
            wire = self.connect(admission)
            client = MemoryClient(wire, client_context(certificate))
            with capturedLogs() as events:
                client.handshake(with_end=HELLO)
                self.assertTrue(wire.disconnecting)
                self.assertEqual(client.read(), b"")
                wire.lose()
            self.assertEqual(
                self.one_warning(list(events)),
                "action: accept_connections | result: refused | ip: 10.0.0.1"
                f" | common_name: {shown} | refused: 1"
                " | error: its common name is not in --agencies",
            )
            self.assertEqual((admission.pending, self.clock.getDelayedCalls()), ({}, []))
            counters = self.factory.counters
            self.assertEqual(counters.limit_hits["agencies"], 1)
            self.assertEqual(counters.accepted_connections, 0)

    def test_refusals_are_logged_once_a_minute(self) -> None:
        """A client that tries again and again does not fill the log."""
        admission = self.admission(tls=self.mutual, agencies=self.agencies)
        with capturedLogs() as events:
            for _ in range(3):
                wire = self.connect(admission)
                MemoryClient(wire, client_context(issue("stranger"))).handshake()
                wire.lose()
        self.assertIn("refused: 1", self.one_warning(list(events)))
        self.assertEqual(self.factory.counters.limit_hits["agencies"], 3)

    def test_a_refused_client_that_stays_is_closed(self) -> None:
        """The timeout of pending connections ends one that does not close."""
        wire, _ = self.arrive("stranger")
        self.assertFalse(wire.aborted)
        self.clock.pump([ADMISSION_TIMEOUT, 0])
        self.assertTrue(wire.aborted)

    def test_the_limit_of_connections_comes_after(self) -> None:
        """A listed client beyond the limit of connections is refused for that."""
        self.factory = OrchestratorFactory(self.clock, max_connections=0)
        with capturedLogs() as events:
            self.arrive()
        self.assertIn("the limit of --max-connections", self.one_warning(list(events)))

    def test_a_reload_reads_all_files(self) -> None:
        """The certificates and the agencies are read again together, for clients to come."""
        admission = self.admission(tls=self.mutual, agencies=self.agencies)
        wire, _ = self.arrive()
        first = self.client().session
        self.files.write("agencies", b"agency-8 = 8\n")
        with capturedLogs() as events:
            admission.reload()
        lines = texts(list(events), LogLevel.info)
        self.assertEqual(["tls_cert" in line for line in lines], [True, False])
        self.assertEqual((first.agency_id, first.is_certified), (7, True))
        wire.lose()
        self.arrive("agency-8")
        self.assertEqual(self.client().session.agency_id, 8)

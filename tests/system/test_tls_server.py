"""Real servers behind TLS and behind a load balancer."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path

from tests.support.builders import FAIL, PEER, SUCCESS, batch_frame, frame, opcode_first, query
from tests.support.certificates import AGENCY, SERVER, Files, client_context, issue, pem
from tests.support.processes import (
    DAEMON,
    FOREGROUND,
    HELLO,
    PATIENCE,
    Client,
    ProcessTestCase,
    Server,
    wait_until,
)

FINISHED = frame(b"\x03\x01\x00\x00\x00")
STALL = """
import pathlib, time
from cafeteria_orch.edge import admission

def stall(message, client):
    pathlib.Path("stalled").touch()
    time.sleep(2)

def register(factory):
    admission.ADMISSION_TIMEOUT = 1.5
    factory.register_processor(0x28, stall)
"""
"""Blocks the reactor for longer than a connection may be pending."""

HEADER = f"PROXY TCP4 {PEER} 198.51.100.1 4000 8080\r\n".encode()


class TLSClient(Client):
    """A client that speaks TLS by the standard library."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        try:
            # An end of the connection without an end of TLS is an error.
            self._tls = context.wrap_socket(
                self._socket, server_hostname=SERVER, suppress_ragged_eofs=False
            )
        except BaseException:
            self._socket.close()
            raise
        self._socket = self._tls

    def server_name(self) -> str:
        """The common name of the server's certificate."""
        certificate: dict[str, tuple[tuple[tuple[str, str]]]] = self._tls.getpeercert()  # type: ignore[assignment]
        return next(value for ((key, value),) in certificate["subject"] if key == "commonName")


class TLSServerTestCase(ProcessTestCase):
    """Starts servers that speak TLS."""

    def setUp(self) -> None:
        super().setUp()
        self.files = Files(self.folder)

    def serve(self, *arguments: str) -> Server:
        """Start a server, and wait until it listens."""
        server = self.launch("--port", "0", "--store", "none", *arguments)
        server.wait_until_listening()
        return server

    def secure(self, *arguments: str) -> Server:
        """Start a server that speaks TLS, and wait until it has answered: it handles signals."""
        server = self.serve("--tls-cert", self.files.cert, *arguments)
        if "--tls-client-ca" not in arguments:
            first = self.talk(server)
            self.assert_served(first)
            first.close()
        return server

    def talk(self, server: Server, context: ssl.SSLContext | None = None) -> TLSClient:
        """Connect a client, and do its handshake."""
        client = TLSClient(server.port, context or client_context())
        self.addCleanup(client.close)
        return client

    def assert_served(self, client: Client) -> None:
        """The server acknowledges a batch."""
        client.send(batch_frame())
        self.assertEqual(client.read(5), SUCCESS)

    def assert_quiet(self, server: Server) -> None:
        """The log has no traceback and no error."""
        self.assertNotRegex(server.log, r"Traceback|Unhandled|#error|#critical")


class ConversationTests(TLSServerTestCase):
    """A conversation by TLS is the same as without."""

    def test_answers_come_before_the_end(self) -> None:
        """The client gets all answers, then the end of TLS, then the end of the connection."""
        server = self.secure()
        hello, batches = HELLO, batch_frame() * 100
        for said, answers in (
            (hello + batches + FINISHED, SUCCESS * 101),
            (opcode_first(b"\x03"), b""),
        ):
            client = self.talk(server)
            client.send(said)
            self.assertEqual(client.read(len(answers) + 1), answers)
        self.assert_quiet(server)

    def test_the_last_answer_arrives(self) -> None:
        """A malformed message is answered, whatever the client sent behind it."""
        server = self.secure()
        client = self.talk(server)
        client.send(batch_frame() + frame(b"\x08") + batch_frame() * 50)
        self.assertEqual(client.read(100), SUCCESS + FAIL + b"\x03")

    def test_a_client_may_close_tls_first(self) -> None:
        """A client that has its answers may close, and the next one is served."""
        server = self.secure()
        client = self.talk(server)
        self.assert_served(client)
        client._tls.unwrap().close()
        self.assert_served(self.talk(server))
        self.assert_quiet(server)

    def test_a_batch_may_span_many_records(self) -> None:
        """Batches longer than a TLS record are acknowledged."""
        server = self.secure()
        client = self.talk(server)
        rows = [("7", "female", "2003-06-13", "x" * 100)] * 5000
        client.send(batch_frame(rows=rows) * 2 + HELLO)
        self.assertEqual(client.read(11), SUCCESS * 2 + FAIL[:1])

    def test_the_drain_closes_tls(self) -> None:
        """A stop ends TLS with each client, and closes a silent connection at once."""
        server = self.secure()
        client = self.talk(server)
        self.assert_served(client)
        silent = self.client(server)
        server.signal(signal.SIGTERM)
        self.assertEqual(client.read(1), b"")
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(silent.read(1), b"")
        client.close()
        server.wait_until_gone()
        self.assertIn("action: drain | result: success", server.log)
        self.assert_quiet(server)


class CertificateTests(TLSServerTestCase):
    """Certificates decide who is admitted."""

    def test_client_certificates(self) -> None:
        """A certificate of the right CA is admitted; others are closed, and the log says why."""
        server = self.secure("--tls-client-ca", self.files.client_ca)
        self.assert_served(self.talk(server, client_context(issue())))
        server.wait_until_logged(f"result: success | ip: 127.0.0.1 | common_name: {AGENCY}\n")
        for context, problem in (
            (client_context(issue(ca="theirs")), "its certificate is of no CA in --tls-client-ca"),
            (client_context(issue(days=-1)), "its certificate, or the CA's, has expired"),
            (client_context(), "it showed no certificate"),
            (client_context(issue(), trusted="theirs"), "it refuses this server: unknown ca"),
        ):
            with self.assertRaises(ssl.SSLError):
                self.talk(server, context).read(1)
            server.wait_until_logged(
                f"result: fail | ip: 127.0.0.1 | error: {problem} | refused: 1"
            )
        plain = self.client(server)
        plain.send(HELLO)
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(plain.read(1), b"")
        server.wait_until_logged("error: it does not speak TLS | refused: 1")
        self.assertEqual(server.log.count("accept_connections"), 1)
        self.assert_served(self.talk(server, client_context(issue())))
        self.assert_quiet(server)

    def test_the_store_has_the_common_name(self) -> None:
        """The session in the store has the name in the client's certificate."""
        store = ("--store", "tables.db")
        server = self.secure("--tls-client-ca", self.files.client_ca, *store)
        self.assert_served(self.talk(server, client_context(issue())))
        path = str(self.folder / "tables.db")
        self.assertEqual(query(path, "SELECT common_name FROM session"), [(AGENCY,)])

    def test_certificates_say_the_agency(self) -> None:
        """Clients that are not listed are refused, and nobody finishes as another agency."""
        listed = self.files.write("agencies", f"{AGENCY} = 7  # north\n".encode())
        server = self.secure(
            *("--tls-client-ca", self.files.client_ca, "--store", "tables.db"),
            *("--agencies", listed),
        )
        path = str(self.folder / "tables.db")
        client = self.talk(server, client_context(issue()))
        self.assert_served(client)
        self.assertEqual(query(path, "SELECT agency_id FROM session"), [(7,)])
        client.send(frame(b"\x03\x08\x00\x00\x00"))
        self.assertEqual(client.read(100), FAIL + b"\x02")
        self.assertEqual(query(path, "SELECT agency_id, finished_at FROM session"), [(7, None)])
        other = client_context(issue("agency-8"))
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            self.assertEqual(self.talk(server, other).read(1), b"")
        server.wait_until_logged("common_name: agency-8 | refused: 1 | error: its common name")
        self.files.write("agencies", b"agency-8\n")
        server.signal(signal.SIGHUP)
        server.wait_until_logged(f"reload | result: fail | error: --agencies {listed}: line 1 ")
        self.files.write("agencies", b"agency-8 = 8\n")
        server.signal(signal.SIGHUP)
        server.wait_until_logged(f"reload | result: success | agencies: {listed} | clients: 1")
        self.assert_served(self.talk(server, other))

    def test_sighup_reads_the_certificates_again(self) -> None:
        """New connections get the new certificate, and open ones go on."""
        server = self.secure()
        old = self.talk(server)
        self.assertEqual(old.server_name(), "server")
        self.files.write("server.pem", b"half a certificate")
        server.signal(signal.SIGHUP)
        server.wait_until_logged(f"reload | result: fail | error: --tls-cert {self.files.cert}: ")
        self.assertEqual(self.talk(server).server_name(), "server")
        self.files.write("server.pem", pem(issue("renewed")))
        server.signal(signal.SIGHUP)
        server.wait_until_logged("action: reload | result: success | tls_cert: ")
        new = self.talk(server)
        self.assertEqual(new.server_name(), "renewed")
        self.assert_served(new)
        self.assert_served(old)

    def test_a_bad_file_ends_the_start(self) -> None:
        """A file that cannot be used is one line and status 1, for a daemon too."""
        for self.starter in (FOREGROUND, DAEMON):
            server = self.launch("--tls-cert", "missing.pem")
            self.assertEqual(server.status(), 1)
            line = f"cafeorch: --tls-cert {self.folder}/missing.pem: No such file or directory"
            self.assertIn(line, server.text("stderr"))
            self.assertEqual(server.text("stderr").count("\n"), 1)

    def test_the_log_warns_of_an_expired_certificate(self) -> None:
        """A server whose own certificate has expired serves all the same."""
        self.files.write("server.pem", pem(issue("server", days=-1)))
        server = self.serve("--tls-cert", self.files.cert)
        server.wait_until_logged("error: it has expired at ")
        self.assert_served(self.talk(server, client_context(trusted=None)))


class SilenceTests(TLSServerTestCase):
    """Silent connections keep nobody out."""

    def test_clients_are_served_among_a_thousand_silent_connections(self) -> None:
        """While 1,100 connections are silent, both old and new clients are served."""
        count, honest = 1100, 5
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        server = self.secure()
        known = self.talk(server)
        with ExitStack() as stack:
            silent = []
            for number in range(count):
                address = ("127.0.0.1", server.port)
                silent.append(stack.enter_context(socket.create_connection(address, PATIENCE)))
                if number % (count // honest) == 0:
                    self.assert_served(self.talk(server))
            self.assert_served(known)
            for _ in range(honest):
                self.assert_served(self.talk(server))
            server.wait_until_logged("1000 others came before it finished its handshake")
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(silent[0].recv(1), b"")
            self.assert_quiet(server)


class BalancerTests(TLSServerTestCase):
    """A load balancer passes connections on, with PROXY headers."""

    def test_a_client_may_half_close_behind_a_balancer(self) -> None:
        """The log has the client's address, and the client gets every answer."""
        server = self.serve("--proxy-protocol")
        client = self.client(server)
        client.send(HEADER + batch_frame() * 3)
        client._socket.shutdown(socket.SHUT_WR)
        self.assertEqual(client.read(100), SUCCESS * 3)
        server.wait_until_logged(f"accept_connections | result: success | ip: {PEER}\n")
        self.assert_quiet(server)

    def test_a_server_that_stalled_reads_before_it_judges(self) -> None:
        """A client whose header arrived in time is served, though the server read it too late."""
        (self.folder / "stall.py").write_text(STALL)
        server = self.serve("--proxy-protocol", "--processors", "stall:register")
        client, staller = self.client(server), self.client(server)
        # The server has accepted both before it stalls.
        staller.send(HEADER + frame(b"\x28"))
        wait_until((self.folder / "stalled").exists, "the server stalls")
        client.send(HEADER + batch_frame())
        self.assertEqual(client.read(5), SUCCESS)

    def test_the_header_comes_before_tls(self) -> None:
        """The handshake may follow the header at once."""
        server = self.serve("--proxy-protocol", "--tls-cert", self.files.cert)
        plain = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        plain.sendall(HEADER)
        with client_context().wrap_socket(plain, server_hostname=SERVER) as client:
            client.sendall(batch_frame())
            self.assertEqual(client.recv(5), SUCCESS)
        server.wait_until_logged(f"accept_connections | result: success | ip: {PEER}\n")
        self.assert_quiet(server)

    def test_only_balancers_are_served(self) -> None:
        """A connection from outside --proxy-from is closed."""
        server = self.serve("--proxy-protocol", "--proxy-from", "192.0.2.0/24,::1")
        client = self.client(server)
        with contextlib.suppress(ConnectionError):
            client.send(HEADER + HELLO)
            self.assertEqual(client.read(1), b"")
        server.wait_until_logged("ip: 127.0.0.1 | error: it is not in --proxy-from | refused: 1")

    def test_a_local_socket_takes_both(self) -> None:
        """A client by a local socket may send a PROXY header, and speak TLS."""
        # An absolute path may be too long for a socket's address.
        path = (self.folder / "socket").relative_to(Path.cwd())
        server = self.launch(
            "--listen=unix:socket",
            "--store=none",
            "--proxy-protocol",
            "--tls-cert",
            self.files.cert,
        )
        wait_until(path.exists, "it listens")
        plain = socket.socket(socket.AF_UNIX)
        self.addCleanup(plain.close)
        plain.settimeout(PATIENCE)
        wait_until(lambda: not plain.connect_ex(str(path)), "it accepts")
        plain.sendall(HEADER)
        with client_context().wrap_socket(plain, server_hostname=SERVER) as client:
            client.sendall(batch_frame())
            self.assertEqual(client.recv(5), SUCCESS)
        server.wait_until_logged(f"ip: {PEER}\n")
        self.assert_quiet(server)

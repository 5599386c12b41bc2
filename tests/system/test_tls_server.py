"""Real servers behind TLS and behind a load balancer, on real sockets."""

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
HEADER = f"PROXY TCP4 {PEER} 198.51.100.1 4000 8080\r\n".encode()


class TLSClient(Client):
    """A socket that speaks TLS, as another program's would."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        try:
            # The end of TLS is to be told from the end of the connection.
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
        """A server that listens."""
        server = self.launch("--port", "0", "--store", "none", *arguments)
        server.wait_until_listening()
        return server

    def secure(self, *arguments: str) -> Server:
        """A server that speaks TLS, and has answered by it: signals find their handlers."""
        server = self.serve("--tls-cert", self.files.cert, *arguments)
        if "--tls-client-ca" not in arguments:
            first = self.talk(server)
            self.assert_served(first)
            first.close()
        return server

    def talk(self, server: Server, context: ssl.SSLContext | None = None) -> TLSClient:
        """A client whose handshake is done."""
        client = TLSClient(server.port, context or client_context())
        self.addCleanup(client.close)
        return client

    def assert_served(self, client: Client) -> None:
        """A client's batch is acknowledged."""
        client.send(batch_frame())
        self.assertEqual(client.read(5), SUCCESS)

    def assert_quiet(self, server: Server) -> None:
        """Nothing in its log is ours to be ashamed of."""
        self.assertNotRegex(server.log, r"Traceback|Unhandled|#error|#critical")


class ConversationTests(TLSServerTestCase):
    """What is said by TLS is what is said without."""

    def test_whole(self) -> None:
        """All answers come, then the end of TLS, and then that of the connection."""
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

    def test_malformed(self) -> None:
        """The last answer arrives, though more was sent after what is malformed."""
        server = self.secure()
        client = self.talk(server)
        client.send(batch_frame() + frame(b"\x08") + batch_frame() * 50)
        self.assertEqual(client.read(100), SUCCESS + FAIL + b"\x03")

    def test_client_closes(self) -> None:
        """A client that has its answers may close as TLS has it."""
        server = self.secure()
        client = self.talk(server)
        self.assert_served(client)
        client._tls.unwrap().close()
        self.assert_served(self.talk(server))
        self.assert_quiet(server)

    def test_large(self) -> None:
        """Batches and answers of many TLS records."""
        server = self.secure()
        client = self.talk(server)
        rows = [("7", "female", "2003-06-13", "x" * 100)] * 5000
        client.send(batch_frame(rows=rows) * 2 + HELLO)
        self.assertEqual(client.read(11), SUCCESS * 2 + FAIL[:1])

    def test_drain(self) -> None:
        """A stop closes clients as TLS does, and those that say nothing at once."""
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
    """Who is let in, and who is told what."""

    def test_client_certificates(self) -> None:
        """One of the right CA is served, by its name; others are closed, and the log says why."""
        server = self.secure("--tls-client-ca", self.files.client_ca)
        self.assert_served(self.talk(server, client_context(issue())))
        server.wait_until_logged(f"result: success | ip: 127.0.0.1 | common_name: {AGENCY}\n")
        for context, problem in (
            (client_context(issue(ca="theirs")), "its certificate is of no CA in --tls-client-ca"),
            (client_context(issue(days=-1)), "its certificate, or the CA's, has expired"),
            (client_context(), "it has shown no certificate"),
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
        server.wait_until_logged("error: it speaks no TLS | refused: 1")
        self.assertEqual(server.log.count("accept_connections"), 1)
        self.assert_served(self.talk(server, client_context(issue())))
        self.assert_quiet(server)

    def test_store(self) -> None:
        """The name of the client's certificate stands in the store."""
        store = ("--store", "tables.db")
        server = self.secure("--tls-client-ca", self.files.client_ca, *store)
        self.assert_served(self.talk(server, client_context(issue())))
        path = str(self.folder / "tables.db")
        self.assertEqual(query(path, "SELECT common_name FROM session"), [(AGENCY,)])

    def test_reload(self) -> None:
        """After SIGHUP new connections get the new certificate, and old ones go on."""
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

    def test_start(self) -> None:
        """What is wrong with a file ends the start in one line, with status 1, as a daemon too."""
        for self.starter in (FOREGROUND, DAEMON):
            server = self.launch("--tls-cert", "missing.pem")
            self.assertEqual(server.status(), 1)
            line = f"cafeorch: --tls-cert {self.folder}/missing.pem: No such file or directory"
            self.assertIn(line, server.text("stderr"))
            self.assertEqual(server.text("stderr").count("\n"), 1)

    def test_expired(self) -> None:
        """The server's own certificate may have expired: the log says so."""
        self.files.write("server.pem", pem(issue("server", days=-1)))
        server = self.serve("--tls-cert", self.files.cert)
        server.wait_until_logged("error: it has expired at ")
        self.assert_served(self.talk(server, client_context(trusted=None)))


class SilenceTests(TLSServerTestCase):
    """Many that connect and keep silent keep nobody out."""

    def test_thousand(self) -> None:
        """While 1,100 keep silent, honest clients are served, old ones and new ones."""
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
            server.wait_until_logged("1000 others came before it had done its handshake")
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(silent[0].recv(1), b"")
            self.assert_quiet(server)


class BalancerTests(TLSServerTestCase):
    """Behind a load balancer."""

    def test_client(self) -> None:
        """The client is the header's; its half-close reaches the server, and all is answered."""
        server = self.serve("--proxy-protocol")
        client = self.client(server)
        client.send(HEADER + batch_frame() * 3)
        client._socket.shutdown(socket.SHUT_WR)
        self.assertEqual(client.read(100), SUCCESS * 3)
        server.wait_until_logged(f"accept_connections | result: success | ip: {PEER}\n")
        self.assert_quiet(server)

    def test_tls(self) -> None:
        """The header comes first, then TLS."""
        server = self.serve("--proxy-protocol", "--tls-cert", self.files.cert)
        plain = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        plain.sendall(HEADER)
        with client_context().wrap_socket(plain, server_hostname=SERVER) as client:
            client.sendall(batch_frame())
            self.assertEqual(client.recv(5), SUCCESS)
        server.wait_until_logged(f"accept_connections | result: success | ip: {PEER}\n")
        self.assert_quiet(server)

    def test_elsewhere(self) -> None:
        """Who is no balancer is not served."""
        server = self.serve("--proxy-protocol", "--proxy-from", "192.0.2.0/24,::1")
        client = self.client(server)
        with contextlib.suppress(ConnectionError):
            client.send(HEADER + HELLO)
            self.assertEqual(client.read(1), b"")
        server.wait_until_logged("ip: 127.0.0.1 | error: it is not in --proxy-from | refused: 1")

    def test_local_socket(self) -> None:
        """A local socket has both as well: its peer is the machine's own."""
        # A whole path may be too long for the address of a socket.
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

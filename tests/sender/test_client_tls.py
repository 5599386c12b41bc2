"""``cafeorch-send`` over TLS, to a real server on the loopback."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

import trustme
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import NameOID
from twisted.internet import reactor as installed_reactor
from twisted.internet import ssl
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch.sender import connection, delivery
from cafeteria_orch.sender.cli import main
from cafeteria_orch.sender.client import OrchestratorClient
from cafeteria_orch.sender.journal import STATE_NAME
from cafeteria_orch.sender.sending import send_directory
from cafeteria_orch.sender.tls import ClientTLS, TLSError, host_of
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange, send_success
from cafeteria_orch.wire.messages import BatchRecvSuccess
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import DATA, Pending, send_options, until
from tests.support.disks import make_folder
from tests.support.scripted import Sent

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

HOST = "127.0.0.1"


def new_year(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=timezone.utc)


def server_context(
    cert: trustme.LeafCert, clients_of: trustme.CA | None = None, **options: Any
) -> ssl.CertificateOptions:
    """The TLS options of a server.

    :param clients_of: the CA of its clients; ``None`` if they show no certificate.
    """
    pem = cert.private_key_and_cert_chain_pem.bytes()
    if clients_of is not None:
        trusted = [ssl.Certificate.loadPEM(clients_of.cert_pem.bytes())]
        options["trustRoot"] = ssl.trustRootFromCertificates(trusted)
    # Twisted passes these on to pyOpenSSL, which wants objects of cryptography.
    options["privateKey"] = load_pem_private_key(pem, None)
    options["certificate"] = load_pem_x509_certificate(pem)
    return ssl.CertificateOptions(**options)


ONLY_1_2 = {
    "insecurelyLowerMinimumTo": ssl.TLSVersion.TLSv1_2,
    "lowerMaximumSecurityTo": ssl.TLSVersion.TLSv1_2,
}
ONLY_1_1 = {
    "insecurelyLowerMinimumTo": ssl.TLSVersion.TLSv1_1,
    "lowerMaximumSecurityTo": ssl.TLSVersion.TLSv1_1,
    "acceptableCiphers": ssl.AcceptableCiphers.fromOpenSSLCipherString("ALL:@SECLEVEL=0"),
}


class FilesTestCase(SynchronousTestCase):
    """A folder with a CA, and a client's certificate and key."""

    def setUp(self) -> None:
        self.folder = make_folder(self)
        self.ca = trustme.CA()
        self.client = self.ca.issue_cert("agency-7.example", common_name="agency-7")
        self.ca_file = self.write("ca.pem", self.ca.cert_pem)
        self.cert_file = self.write("client.pem", *self.client.cert_chain_pems)
        self.key_file = self.write("client.key", self.client.private_key_pem)

    def write(self, name: str, *blobs: trustme.Blob | bytes) -> Path:
        path = self.folder / name
        parts = [blob if isinstance(blob, bytes) else blob.bytes() for blob in blobs]
        path.write_bytes(b"".join(parts))
        return path


class Mistakes(FilesTestCase):
    """A mistake in the options is found before anything is sent."""

    def assert_refused(self, pattern: str, **files: Path) -> None:
        """These files are refused in one line."""
        with self.assertRaisesRegex(TLSError, pattern) as caught:
            ClientTLS(HOST, **{"ca": self.ca_file, **files})
        self.assertNotIn("\n", str(caught.exception))

    def test_each_option_names_its_file_in_an_error(self) -> None:
        """The line about a file that cannot be used begins with the option and the file."""
        missing = self.folder / "none.pem"
        self.assert_refused(f"^--tls-ca {missing}: No such file", ca=missing)
        self.assert_refused(f"^--tls-cert {missing}: No such file", cert=missing)
        self.assert_refused(f"^--tls-key {missing}: No such", cert=self.cert_file, key=missing)
        self.assert_refused("^--tls-cert .*no private key.*--tls-key", cert=self.cert_file)

    def test_a_host_must_be_a_name_or_an_address(self) -> None:
        """A host for which no certificate can exist is refused."""
        with self.assertRaisesRegex(TLSError, r"^--connect: .*a\.\.b"):
            ClientTLS("a..b", self.ca_file)

    def test_without_the_extra_the_error_says_what_to_install(self) -> None:
        """Each part of the extra is needed."""
        for module in ("service_identity", "OpenSSL"):
            with patch.dict(sys.modules, {module: None}):
                self.assert_refused(r"^--tls-ca needs .*: pip install 'cafeteria_orch\[tls\]'$")

    def test_host_of_an_endpoint(self) -> None:
        """Any form of a TCP endpoint has a host, and no other endpoint has."""
        for connect, host in (
            ("tcp:cafe.example:8080", "cafe.example"),
            ("tcp:port=8080:host=cafe.example:timeout=3", "cafe.example"),
            ("TCP:127.0.0.1:8080", "127.0.0.1"),
            (r"tcp:2001\:db8\:\:1:8080", "2001:db8::1"),
            ("unix:/run/cafeorch", None),
            ("tls:cafe.example:8080", None),
        ):
            self.assertEqual(host_of(connect), host)


class Arguments(FilesTestCase):
    """The command checks its options."""

    def run_main(self, *arguments: str) -> str:
        """Run the command with arguments that it refuses, and return its last line."""
        err = StringIO()
        with patch.object(sys, "stderr", err):
            exited = self.assertRaises(SystemExit, main, [str(DATA), "--agency-id=1", *arguments])
        self.assertEqual(exited.code, 2)
        return err.getvalue().splitlines()[-1]

    def test_mistakes_end_the_command(self) -> None:
        """Options that do not go together, and files that cannot be used, are one line each."""
        ca, cert = f"--tls-ca={self.ca_file}", f"--tls-cert={self.cert_file}"
        for arguments, what in (
            ([cert], "--tls-cert .*--tls-ca"),
            ([ca, f"--tls-key={self.key_file}"], "--tls-key .*--tls-cert"),
            ([f"--tls-key={self.key_file}"], "--tls-key .*--tls-cert"),
            ([ca, cert], f"--tls-cert {self.cert_file}: there is no private key"),
            (["--tls-ca=none.pem"], "--tls-ca none.pem: No such file"),
            ([ca, "--connect=unix:/run/cafeorch"], "--connect tcp:HOST:PORT, not unix:"),
        ):
            self.assertRegex(self.run_main(*arguments), f"^cafeorch-send: error: .*{what}")


class Talk(Protocol):
    """A server of another protocol, which speaks first."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.write(b"220 mail.example ESMTP\r\n")


class Hangup(Protocol):
    """A server that closes every connection at once."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.loseConnection()


class TLSTestCase(TestCase, FilesTestCase):
    """Sends a folder to a real server on the loopback."""

    timeout = 20

    def setUp(self) -> None:
        FilesTestCase.setUp(self)
        self.connections = 0
        self.rows = 0
        self.names: set[str] = set()
        self.server = self.ca.issue_cert(HOST, "localhost")
        self.factory = self.counted(OrchestratorFactory(reactor))
        for opcode in range(Opcode.NEW_MENU_ITEMS, Opcode.EOF):
            self.factory.register_processor(opcode, self.count)
        self.state = self.folder / STATE_NAME
        self.patch(delivery, "_backoff", lambda _: 0.01)

    def count(self, batch: Any, client: Exchange) -> None:
        """Count the rows of a batch, and note the name of its client."""
        self.rows += batch.amount
        (connection,) = self.factory.connections
        shown = connection.transport.getHandle().get_peer_certificate(as_cryptography=True)
        names = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME) if shown else []
        self.names |= {name.value for name in names} or {"nobody"}
        send_success(client)

    def counted(self, factory: Any) -> Any:
        """Count the connections to a factory."""
        build = factory.buildProtocol

        def counting(address: Any) -> Any:
            self.connections += 1
            return build(address)

        self.patch(factory, "buildProtocol", counting)
        return factory

    def listen(self, context: ssl.CertificateOptions | None = None, factory: Any = None) -> None:
        """Start a server, by TLS if it has a context."""
        self.state.unlink(missing_ok=True)
        factory = factory or self.factory
        if context is None:
            port = reactor.listenTCP(0, factory, interface=HOST)
        else:
            port = reactor.listenSSL(0, factory, context, interface=HOST)
        self.port = port
        self.addCleanup(until, reactor, lambda: not self.factory.connections)
        self.addCleanup(port.stopListening)

    async def send(
        self,
        *files: Path,
        host: str = HOST,
        ca: Path | None = None,
        retry_for: float = 1.0,
        **options: Any,
    ) -> Sent:
        """Send the folder of the tests' data.

        :param files: the client's certificate and key.
        """
        out, err = StringIO(), StringIO()
        tls = ClientTLS(host, ca or self.ca_file, *files)
        connect = f"tcp:{host}:{self.port.getHost().port}"
        parsed = send_options(
            DATA, connect=connect, tls=tls, state=self.state, retry_for=retry_for, **options
        )
        with patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
            status = await send_directory(reactor, parsed)
        return Sent(status, out.getvalue(), err.getvalue())


class Sending(TLSTestCase):
    """Everything arrives as it does without TLS."""

    async def test_a_server_is_known_by_address_or_name(self) -> None:
        """All rows arrive, in both framings."""
        self.listen(server_context(self.server))
        for host, framing in ((HOST, "int32"), ("localhost", "opcode-first")):
            self.rows = 0
            self.state.unlink(missing_ok=True)
            sent = await self.send(host=host, framing=framing)
            self.assertEqual((sent.status, sent.lines), (0, []))
            self.assertRegex(sent.out, rf"(?m)^acknowledged +8 +{self.rows} +8 ")
            self.assertGreater(self.rows, 100)
        self.assertEqual(self.names, {"nobody"})

    async def test_a_client_shows_its_certificate(self) -> None:
        """A server that requires a certificate gets it, with either version of TLS."""
        for versions in ({}, ONLY_1_2):
            self.listen(server_context(self.server, self.ca, **versions))
            sent = await self.send(self.cert_file, self.key_file)
            self.assertEqual((sent.status, sent.lines), (0, []))
            self.assertEqual(self.names, {"agency-7"})

    async def test_a_client_shows_its_chain(self) -> None:
        """The certificates between the client's and its CA are sent too."""
        agency = self.ca.create_child_ca().issue_cert("agency-8.example", common_name="agency-8")
        both = self.write("both.pem", agency.private_key_and_cert_chain_pem)
        self.listen(server_context(self.server, self.ca))
        sent = await self.send(both)
        self.assertEqual((sent.status, sent.lines), (0, []))
        self.assertEqual(self.names, {"agency-8"})

    async def test_several_cas_are_trusted(self) -> None:
        """The file of CAs may be a bundle, as while one CA replaces another."""
        bundle = self.write("bundle.pem", trustme.CA().cert_pem, self.ca.cert_pem)
        self.listen(server_context(self.server))
        sent = await self.send(ca=bundle)
        self.assertEqual((sent.status, sent.lines), (0, []))

    async def test_a_cut_connection_is_resumed(self) -> None:
        """The client connects again, and sends no batch again that was acknowledged."""
        silent = Pending()
        self.factory.register_processor(Opcode.NEW_STORES, silent, replace=True)
        self.listen(server_context(self.server))
        sending = Deferred.fromCoroutine(self.send(batch_rows=5, window=1))
        await until(reactor, lambda: silent.in_progress)
        before = self.rows
        self.assertGreater(before, 0)
        self.factory.register_processor(Opcode.NEW_STORES, self.count, replace=True)
        self.factory.abort()
        silent.finish()
        sent = await sending
        self.assertEqual((sent.status, self.connections), (0, 2), sent.err)
        self.assertIn("Trying again for", sent.err)
        self.assertNotIn("handshake", sent.err)
        self.assertRegex(sent.out, rf"(?m)^acknowledged +8 +{self.rows} ")

    async def test_a_second_run_sends_no_batch(self) -> None:
        """A run that finds every batch acknowledged sends none, and says so."""
        self.listen(server_context(self.server))
        await self.send()
        rows = self.rows
        sent = await self.send()
        self.assertEqual((sent.status, sent.lines, self.rows), (0, [], rows))
        self.assertIn("All had been acknowledged before.", sent.out)


class Refusals(TLSTestCase):
    """A failure that would repeat ends the first attempt, with one line and status 1."""

    async def assert_refused(self, pattern: str, *files: Path, **options: Any) -> None:
        sent = await self.send(*files, **options)
        self.assertEqual((sent.status, len(sent.lines), self.connections), (1, 1, 1), sent.err)
        self.assertRegex(sent.lines[0], f"^cafeorch-send: {pattern}")
        self.assertEqual(self.rows, 0)

    async def test_a_certificate_of_another_ca(self) -> None:
        """The server's CA must be in the file of CAs."""
        other = self.write("other.pem", trustme.CA().cert_pem)
        self.listen(server_context(self.server))
        await self.assert_refused(
            f"the server's certificate is not signed by a CA in {other}, but by .*trustme.*--tls-ca",
            ca=other,
        )

    async def test_an_expired_certificate(self) -> None:
        """The line says when the server's certificate expired."""
        self.listen(
            server_context(
                self.ca.issue_cert(HOST, not_before=new_year(2020), not_after=new_year(2021))
            )
        )
        await self.assert_refused("the server's certificate.* has expired: .* at 2021-01-01 ")

    async def test_a_certificate_that_is_not_valid_yet(self) -> None:
        """The line asks for the clock, too."""
        self.listen(
            server_context(
                self.ca.issue_cert(HOST, not_before=new_year(2090), not_after=new_year(2091))
            )
        )
        await self.assert_refused(
            "the server's certificate.* is not valid yet: .* before 2090-01-01 .*clock"
        )

    async def test_a_certificate_for_other_hosts(self) -> None:
        """The line says which hosts the server's certificate is for."""
        for host in (HOST, "localhost"):
            self.connections = 0
            self.listen(server_context(self.ca.issue_cert("cafe.example", "192.0.2.1")))
            await self.assert_refused(
                f"the server's certificate is not for {host} but for cafe.example, 192.0.2.1:"
                " say --connect",
                host=host,
            )

    async def test_a_certificate_for_no_host(self) -> None:
        """An agency cannot pose as the server with its own certificate of the same CA."""
        for names in ((), (f"agency@{HOST}",)):
            self.connections = 0
            self.listen(server_context(self.ca.issue_cert(*names, common_name=HOST)))
            await self.assert_refused(".* not for 127.0.0.1 but for no host at all")

    async def test_a_server_that_requires_a_certificate(self) -> None:
        """The line names the option for it, with either version of TLS."""
        for versions in ({}, ONLY_1_2):
            self.connections = 0
            self.listen(server_context(self.server, self.ca, **versions))
            await self.assert_refused("the server wants a certificate of this client .*--tls-cert")

    async def test_a_server_that_refuses_the_certificate(self) -> None:
        """The line names the file, with either version of TLS."""
        both = self.write("both.pem", trustme.CA().issue_cert("x").private_key_and_cert_chain_pem)
        for versions in ({}, ONLY_1_2):
            self.connections = 0
            self.listen(server_context(self.server, self.ca, **versions))
            await self.assert_refused(
                f"the server refuses the certificate in {both} .unknown ca.: .*--tls-cert", both
            )

    async def test_a_server_without_tls_1_2(self) -> None:
        """A server that speaks TLS 1.1 at most is refused."""
        self.listen(server_context(self.server, **ONLY_1_1))
        await self.assert_refused("the server does not speak TLS 1.2 or newer .protocol version")

    async def test_a_server_without_tls(self) -> None:
        """An orchestrator in plain text, or a server of another protocol, is refused."""
        for factory in (self.factory, self.counted(Factory.forProtocol(Talk))):
            self.connections = 0
            self.listen(factory=factory)
            await self.assert_refused("the server does not speak TLS .*--tls-ca")


class Retries(TLSTestCase):
    """A failure that may pass is tried again."""

    async def test_a_close_before_the_handshake(self) -> None:
        """Each line asks whether the server speaks TLS."""
        self.listen(factory=Factory.forProtocol(Hangup))
        sent = await self.send(retry_for=0.05)
        *tries, last = sent.lines
        self.assertEqual(sent.status, 1)
        self.assertGreaterEqual(len(tries), 1)
        for line in sent.lines:
            self.assertRegex(line, "handshake was not finished: does this server speak TLS")
        self.assertIn("Gave up", last)

    async def test_a_silent_server(self) -> None:
        """A server that sends nothing may not speak TLS either."""
        self.patch(connection, "ANSWER_TIMEOUT", 0.05)
        self.listen(factory=Factory.forProtocol(Protocol))
        sent = await self.send(retry_for=0)
        self.assertEqual((sent.status, len(sent.lines)), (1, 1), sent.err)
        self.assertRegex(sent.lines[0], "does this server speak TLS.*Gave up")

    async def test_a_server_that_has_gone(self) -> None:
        """A refused connection is not blamed on TLS, whatever the one before ended by."""
        self.listen(factory=self.counted(Factory.forProtocol(Hangup)))
        sending = Deferred.fromCoroutine(self.send(retry_for=0.3))
        await until(reactor, lambda: self.connections)
        await self.port.stopListening()
        sent = await sending
        self.assertEqual(sent.status, 1)
        self.assertRegex(sent.lines[0], "does this server speak TLS")
        self.assertRegex(sent.lines[-1], "Connection was refused.*Gave up")
        self.assertNotIn("TLS", sent.lines[-1])

    async def test_each_connection_is_verified(self) -> None:
        """A program may connect again after a refusal, and then succeed."""
        tls = ClientTLS(HOST, self.ca_file)
        for cert, expected in ((trustme.CA().issue_cert(HOST), None), (self.server, True)):
            self.listen(server_context(cert))
            endpoint = clientFromString(reactor, f"tcp:{HOST}:{self.port.getHost().port}")
            client = await connectProtocol(tls.wrap(endpoint), OrchestratorClient())
            try:
                self.assertIsInstance(await client.send_hello(UUID(int=7)), BatchRecvSuccess)
                await client.finish()
            except ConnectionLost as error:
                self.assertIsNone(expected)
                self.assertRaisesRegex(TLSError, "not signed", tls.explain, error)
            else:
                self.assertTrue(expected)


class PlainTests(TLSTestCase):
    """Without ``--tls-ca``, to a server that wants TLS."""

    async def send_plainly(self, **options: Any) -> Sent:
        connect = f"tcp:{HOST}:{self.port.getHost().port}"
        options = {"connect": connect, "state": self.state, "retry_for": 30.0, **options}
        out, err = StringIO(), StringIO()
        with patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
            status = await send_directory(reactor, send_options(DATA, **options))
        return Sent(status, out.getvalue(), err.getvalue())

    async def test_a_server_that_wants_tls(self) -> None:
        """It is named at once, in any framing and with any version, with the option to use."""
        for versions in ({}, ONLY_1_2):
            self.listen(server_context(self.server, **versions))
            for framing in ("int32", "opcode-first"):
                sent = await self.send_plainly(framing=framing)
                self.assertEqual((sent.status, len(sent.lines)), (1, 1), sent.err)
                self.assertRegex(
                    sent.lines[0], r"^cafeorch-send: the server at tcp:.* speaks TLS: .*--tls-ca$"
                )
                self.assertEqual(self.rows, 0)

    async def test_a_server_that_hangs_up(self) -> None:
        """One that only closes is tried again, as ever."""
        self.port = reactor.listenTCP(0, Factory.forProtocol(HangingUp), interface=HOST)
        self.addCleanup(self.port.stopListening)
        sent = await self.send_plainly(retry_for=0.0)
        self.assertEqual((sent.status, len(sent.lines)), (1, 1), sent.err)
        self.assertIn("Gave up", sent.lines[0])


class HangingUp(Protocol):
    """Closes at once."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.loseConnection()

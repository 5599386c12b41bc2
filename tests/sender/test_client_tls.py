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
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import NameOID
from twisted.internet import reactor as installed_reactor
from twisted.internet import ssl
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch.sender import delivery
from cafeteria_orch.sender.cli import STATE_NAME, main, send_directory
from cafeteria_orch.sender.client import OrchestratorClient
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
    """How a server listens.

    :param clients_of: the CA that has to have signed its clients' certificates.
    """
    pem = cert.private_key_and_cert_chain_pem.bytes()
    if clients_of is not None:
        trusted = [ssl.Certificate.loadPEM(clients_of.cert_pem.bytes())]
        options["trustRoot"] = ssl.trustRootFromCertificates(trusted)
    # pyOpenSSL wants objects of cryptography by now, which Twisted passes on.
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
    """A folder with what a client needs."""

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
    """What is wrong with the files is found before anything is sent."""

    def assert_refused(
        self,
        pattern: str,
        cert: Path | None = None,
        key: Path | None = None,
        ca: Path | None = None,
    ) -> None:
        """These files are refused in one line."""
        with self.assertRaisesRegex(TLSError, pattern) as caught:
            ClientTLS(HOST, ca or self.ca_file, cert, key)
        self.assertNotIn("\n", str(caught.exception))

    def test_accepted(self) -> None:
        """The key has a file of its own, or stands in that of the certificate."""
        both = self.write("both.pem", self.client.private_key_and_cert_chain_pem)
        turned = self.write(
            "turned.pem", *self.client.cert_chain_pems, self.client.private_key_pem
        )
        ClientTLS(HOST, self.ca_file)
        ClientTLS("cafe.example", self.ca_file, self.cert_file, self.key_file)
        for path in (both, turned):
            ClientTLS("2001:db8::1", self.ca_file, path)

    def test_missing(self) -> None:
        """A file that is not there, or is a folder."""
        missing = self.folder / "none.pem"
        for path, why in ((missing, "No such file"), (self.folder, "Is a directory")):
            self.assert_refused(f"^--tls-ca {path}: {why}", ca=path)
            self.assert_refused(f"^--tls-cert {path}: {why}", cert=path)
            self.assert_refused(f"^--tls-key {path}: {why}", self.cert_file, path)

    def test_no_pem(self) -> None:
        """A file that holds something else, or something else in PEM form."""
        for content in (b"", b"\x30\x82\x01", self.key_file.read_bytes()):
            path = self.write("other.pem", content)
            for option, given in (("--tls-ca", {"ca": path}), ("--tls-cert", {"cert": path})):
                self.assert_refused(f"^{option} {path}: there is no certificate in PEM", **given)
        path = self.write("other.key", b"secret")
        self.assert_refused(f"^--tls-key {path}: there is no private key", self.cert_file, path)
        broken = self.cert_file.read_bytes().replace(b"MII", b"###", 1)
        self.assert_refused("there is no certificate in PEM", ca=self.write("broken.pem", broken))

    def test_no_key(self) -> None:
        """Where the key is not in the file of the certificate, the option for it is named."""
        self.assert_refused(
            f"^--tls-cert {self.cert_file}: there is no private key.*--tls-key", self.cert_file
        )

    def test_key_of_another(self) -> None:
        """A key that does not belong to the certificate."""
        other = self.write("other.key", self.ca.issue_cert("x.example").private_key_pem)
        self.assert_refused(
            f"^--tls-key {other}: .*not that of the certificate in {self.cert_file}",
            self.cert_file,
            other,
        )

    def test_passphrase(self) -> None:
        """A key with a passphrase: nobody may be there to be asked."""
        key = load_pem_private_key(self.key_file.read_bytes(), None)
        locked = self.write(
            "locked.key",
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
        )
        self.assert_refused(f"^--tls-key {locked}: .*passphrase", self.cert_file, locked)

    def test_host(self) -> None:
        """A host that has no name that a certificate can be for."""
        with self.assertRaisesRegex(TLSError, r"^--connect: .*a\.\.b"):
            ClientTLS("a..b", self.ca_file)

    def test_without_the_extra(self) -> None:
        """Where a part of the extra is missing it says what to install."""
        for module in ("service_identity", "OpenSSL"):
            with patch.dict(sys.modules, {module: None}):
                self.assert_refused(r"^--tls-ca needs .*: pip install 'Twisted\[tls\]'$")

    def test_host_of(self) -> None:
        """The host is found in any form of a TCP endpoint, and in no other one."""
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
    """The options of the command."""

    def run_main(self, *arguments: str) -> str:
        """Run the command, which is to refuse its arguments; its last line."""
        err = StringIO()
        with patch.object(sys, "stderr", err):
            exited = self.assertRaises(SystemExit, main, [str(DATA), *arguments])
        self.assertEqual(exited.code, 2)
        return err.getvalue().splitlines()[-1]

    def test_mistakes(self) -> None:
        """Options that do not go together, and files that are not what they have to be."""
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
    """A server of something else, which greets."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.write(b"220 mail.example ESMTP\r\n")


class Hangup(Protocol):
    """A server that is about to go away."""

    transport: Any

    def connectionMade(self) -> None:
        self.transport.loseConnection()


class TLSTestCase(TestCase, FilesTestCase):
    """Sends a folder to a server, and sees what comes of it."""

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
        """A processor that counts rows, and notes whose they are."""
        self.rows += batch.amount
        (connection,) = self.factory.connections
        shown = connection.transport.getHandle().get_peer_certificate(as_cryptography=True)
        names = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME) if shown else []
        self.names |= {name.value for name in names} or {"nobody"}
        send_success(client)

    def counted(self, factory: Any) -> Any:
        """Have the connections to a factory counted."""
        build = factory.buildProtocol

        def counting(address: Any) -> Any:
            self.connections += 1
            return build(address)

        self.patch(factory, "buildProtocol", counting)
        return factory

    def listen(self, context: ssl.CertificateOptions | None = None, factory: Any = None) -> None:
        """Have a server listen, by TLS if it has a context."""
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

        :param files: those of the client's certificate and key.
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
    """All arrives as it does without TLS."""

    async def test_everything(self) -> None:
        """To a server that is named by its address, or by its name, in both framings."""
        self.listen(server_context(self.server))
        for host, framing in ((HOST, "int32"), ("localhost", "opcode-first")):
            self.rows = 0
            self.state.unlink(missing_ok=True)
            sent = await self.send(host=host, framing=framing)
            self.assertEqual((sent.status, sent.lines), (0, []))
            self.assertRegex(sent.out, rf"(?m)^acknowledged +8 +{self.rows} +8 ")
            self.assertGreater(self.rows, 100)
        self.assertEqual(self.names, {"nobody"})

    async def test_own_certificate(self) -> None:
        """A server that wants a certificate gets it, with either version."""
        for versions in ({}, ONLY_1_2):
            self.listen(server_context(self.server, self.ca, **versions))
            sent = await self.send(self.cert_file, self.key_file)
            self.assertEqual((sent.status, sent.lines), (0, []))
            self.assertEqual(self.names, {"agency-7"})

    async def test_chain(self) -> None:
        """What is between its certificate and its CA goes along."""
        agency = self.ca.create_child_ca().issue_cert("agency-8.example", common_name="agency-8")
        both = self.write("both.pem", agency.private_key_and_cert_chain_pem)
        self.listen(server_context(self.server, self.ca))
        sent = await self.send(both)
        self.assertEqual((sent.status, sent.lines), (0, []))
        self.assertEqual(self.names, {"agency-8"})

    async def test_several_authorities(self) -> None:
        """The file of the CAs may hold several, as while one takes the place of another."""
        bundle = self.write("bundle.pem", trustme.CA().cert_pem, self.ca.cert_pem)
        self.listen(server_context(self.server))
        sent = await self.send(ca=bundle)
        self.assertEqual((sent.status, sent.lines), (0, []))

    async def test_resume(self) -> None:
        """A connection that is cut is made anew, and what was acknowledged is not sent again."""
        silent = Pending()
        self.factory.register_processor(Opcode.NEW_STORES, silent, replace=True)
        self.listen(server_context(self.server))
        sending = Deferred.fromCoroutine(self.send(batch_rows=5, window=1))
        await until(reactor, lambda: silent.in_hand)
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

    async def test_again(self) -> None:
        """A second run finds that all was acknowledged, and connects to nobody."""
        self.listen(server_context(self.server))
        await self.send()
        sent = await self.send()
        self.assertEqual((sent.status, sent.lines, self.connections), (0, [], 1))
        self.assertIn("All had been acknowledged before.", sent.out)


class Refusals(TLSTestCase):
    """What does not get better is one line and status 1, at the first connection."""

    async def assert_refused(self, pattern: str, *files: Path, **options: Any) -> None:
        sent = await self.send(*files, **options)
        self.assertEqual((sent.status, len(sent.lines), self.connections), (1, 1, 1), sent.err)
        self.assertRegex(sent.lines[0], f"^cafeorch-send: {pattern}")
        self.assertEqual(self.rows, 0)

    async def test_unknown_authority(self) -> None:
        """A certificate that another CA has signed."""
        other = self.write("other.pem", trustme.CA().cert_pem)
        self.listen(server_context(self.server))
        await self.assert_refused(
            f"the server's certificate is not signed by a CA in {other}, but by .*trustme.*--tls-ca",
            ca=other,
        )

    async def test_expired(self) -> None:
        """A certificate that was valid once."""
        self.listen(
            server_context(
                self.ca.issue_cert(HOST, not_before=new_year(2020), not_after=new_year(2021))
            )
        )
        await self.assert_refused("the server's certificate.* has expired: .* at 2021-01-01 ")

    async def test_not_valid_yet(self) -> None:
        """One that will be, or a clock that is wrong."""
        self.listen(
            server_context(
                self.ca.issue_cert(HOST, not_before=new_year(2090), not_after=new_year(2091))
            )
        )
        await self.assert_refused(
            "the server's certificate.* is not valid yet: .* before 2090-01-01 .*clock"
        )

    async def test_wrong_name(self) -> None:
        """A certificate for other hosts: which ones is said."""
        for host in (HOST, "localhost"):
            self.connections = 0
            self.listen(server_context(self.ca.issue_cert("cafe.example", "192.0.2.1")))
            await self.assert_refused(
                f"the server's certificate is not for {host} but for cafe.example, 192.0.2.1:"
                " say --connect",
                host=host,
            )

    async def test_no_name(self) -> None:
        """A certificate for no host, as an agency has it of the same CA: it may not pose as one."""
        for names in ((), (f"agency@{HOST}",)):
            self.connections = 0
            self.listen(server_context(self.ca.issue_cert(*names, common_name=HOST)))
            await self.assert_refused(".* not for 127.0.0.1 but for no host at all")

    async def test_certificate_required(self) -> None:
        """A server that wants a certificate where there is none, with either version."""
        for versions in ({}, ONLY_1_2):
            self.connections = 0
            self.listen(server_context(self.server, self.ca, **versions))
            await self.assert_refused("the server wants a certificate of this client .*--tls-cert")

    async def test_certificate_refused(self) -> None:
        """A certificate that the server's CA has not signed, with either version."""
        both = self.write("both.pem", trustme.CA().issue_cert("x").private_key_and_cert_chain_pem)
        for versions in ({}, ONLY_1_2):
            self.connections = 0
            self.listen(server_context(self.server, self.ca, **versions))
            await self.assert_refused(
                f"the server refuses the certificate in {both} .unknown ca.: .*--tls-cert", both
            )

    async def test_too_old(self) -> None:
        """A server that speaks nothing newer than TLS 1.1."""
        self.listen(server_context(self.server, **ONLY_1_1))
        await self.assert_refused("the server speaks no TLS that is new enough .protocol version")

    async def test_no_tls(self) -> None:
        """An orchestrator without TLS, and a server of something else."""
        for factory in (self.factory, self.counted(Factory.forProtocol(Talk))):
            self.connections = 0
            self.listen(factory=factory)
            await self.assert_refused("the server does not speak TLS .*--tls-ca")


class Retries(TLSTestCase):
    """What may get better is tried again."""

    async def test_hung_up(self) -> None:
        """A server that closes before there is TLS is tried again; what may be wrong is said."""
        self.listen(factory=Factory.forProtocol(Hangup))
        sent = await self.send(retry_for=0.05)
        *tries, last = sent.lines
        self.assertEqual(sent.status, 1)
        self.assertGreaterEqual(len(tries), 1)
        for line in sent.lines:
            self.assertRegex(line, "handshake was not done yet: does this server speak TLS")
        self.assertIn("Gave up", last)

    async def test_silent(self) -> None:
        """So is one that says nothing at all."""
        self.patch(delivery, "ANSWER_TIMEOUT", 0.05)
        self.listen(factory=Factory.forProtocol(Protocol))
        sent = await self.send(retry_for=0)
        self.assertEqual((sent.status, len(sent.lines)), (1, 1), sent.err)
        self.assertRegex(sent.lines[0], "does this server speak TLS.*Gave up")

    async def test_away(self) -> None:
        """A server that is not there is none of TLS, whatever was before."""
        self.listen(factory=self.counted(Factory.forProtocol(Hangup)))
        sending = Deferred.fromCoroutine(self.send(retry_for=0.3))
        await until(reactor, lambda: self.connections)
        await self.port.stopListening()
        sent = await sending
        self.assertEqual(sent.status, 1)
        self.assertRegex(sent.lines[0], "does this server speak TLS")
        self.assertRegex(sent.lines[-1], "Connection was refused.*Gave up")
        self.assertNotIn("TLS", sent.lines[-1])

    async def test_replaced(self) -> None:
        """A program may try again what was refused: the next connection is verified anew."""
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

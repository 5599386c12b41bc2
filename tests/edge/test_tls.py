"""The server's certificates: read from files, read again, and what is wrong with them."""

from __future__ import annotations

import gc
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.edge.tls import CertificateError, ServerTLS
from tests.support.builders import texts
from tests.support.certificates import Files, issue, pem


class TLSTestCase(SynchronousTestCase):
    """Files in a folder of the test's own, on a clock that is right."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.files = Files(self.folder)
        self.clock = Clock()
        self.clock.advance(time.time())

    def load(self, cert: str = "", **files: str) -> ServerTLS:
        """What the server makes of some files."""
        return ServerTLS(self.clock, cert or self.files.cert, **files)

    def mistake(self, *parts: str, cert: str = "", **files: str) -> None:
        """Files are refused, in one line that has these parts and a remedy."""
        error = self.assertRaises(CertificateError, self.load, cert, **files)
        for part in parts:
            self.assertIn(part, str(error))
        self.assertRegex(str(error), r"^--tls-[a-z-]+ [^\n]+: [^\n]+$")


class FileTests(TLSTestCase):
    """What is wrong with the files is said by the option, the file, and what to do."""

    def test_key_of_its_own(self) -> None:
        """Certificate and key may be in two files, or in one."""
        certificate = issue("server")
        cert = self.files.write("cert.pem", pem(certificate, with_key=False))
        key = self.files.write("key.pem", certificate.private_key_pem.bytes())
        self.load(cert, key=key)
        self.load(self.files.cert)

    def test_missing(self) -> None:
        """Each of the files may not be there."""
        missing = str(self.folder / "missing.pem")
        self.mistake("--tls-cert ", missing, "No such file", cert=missing)
        self.mistake("--tls-key ", missing, "No such file", key=missing)
        self.mistake("--tls-client-ca ", missing, "No such file", client_ca=missing)

    def test_unreadable(self) -> None:
        """What is there may not be for this user to read."""
        Path(self.files.cert).chmod(0)
        if os.access(self.files.cert, os.R_OK):
            raise SkipTest("whoever runs this may read everything")
        self.mistake("--tls-cert ", "Permission denied", "may read")

    def test_folder(self) -> None:
        """A folder is no file."""
        self.mistake("--tls-cert ", "Is a directory", cert=str(self.folder))

    def test_no_pem(self) -> None:
        """Files of something else, or of nothing, or broken."""
        whole = Path(self.files.cert).read_bytes()
        for data in (b"", b"not this\n", whole[: len(whole) // 2], whole.replace(b"MII", b"MIX")):
            path = self.files.write("bad.pem", data)
            self.mistake("--tls-cert ", path, "-----BEGIN CERTIFICATE-----", cert=path)
            self.mistake("--tls-client-ca ", path, client_ca=path)
        for data in (b"", b"not this\n", b"-----BEGIN PRIVATE KEY-----\n"):
            path = self.files.write("bad.pem", data)
            self.mistake("--tls-key ", path, "no private key", key=path)

    def test_key_is_missing(self) -> None:
        """A certificate whose file has no key, without an option for that."""
        path = self.files.write("cert.pem", pem(issue("server"), with_key=False))
        self.mistake("--tls-cert ", "no private key", "--tls-key", cert=path)

    def test_key_of_another(self) -> None:
        """A key that is not the certificate's, of its kind or of another."""
        other = generate_private_key(65537, 2048)
        rsa = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for data in (issue("other").private_key_pem.bytes(), rsa):
            self.mistake("--tls-key ", "server.pem", key=self.files.write("key.pem", data))

    def test_encrypted_key(self) -> None:
        """A key that wants a passphrase: nobody is asked for it."""
        key: Any = load_pem_private_key(issue().private_key_pem.bytes(), None)
        encryption = BestAvailableEncryption(b"secret")
        data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        self.mistake("--tls-key ", "encrypted", key=self.files.write("key.pem", data))

    def test_expired(self) -> None:
        """A certificate that has expired is served all the same, with a warning."""
        path = self.files.write("old.pem", pem(issue("server", days=-1)))
        with capturedLogs() as events:
            self.load(path)
        (line,) = texts(list(events), LogLevel.warn)
        self.assertRegex(line, rf"tls_cert: {path} \| error: it has expired at .*: renew it")

    def test_not_yet_valid(self) -> None:
        """So is one whose time has not come."""
        self.clock = Clock()
        with capturedLogs() as events:
            self.load()
        self.assertIn("it is not valid before", texts(list(events), LogLevel.warn)[0])

    def test_valid(self) -> None:
        """One that is valid is not spoken of."""
        with capturedLogs() as events:
            self.load(client_ca=self.files.client_ca)
        self.assertEqual(list(events), [])

    def test_without_the_extra(self) -> None:
        """Without pyOpenSSL one line says what to install."""
        with patch.dict(sys.modules, {"OpenSSL": None}):
            error = self.assertRaises(CertificateError, self.load)
        self.assertRegex(str(error), r"^--tls-cert [^\n]*pip install 'cafeteria_orch\[tls\]'$")


class ReloadTests(TLSTestCase):
    """The certificates are read again while the server runs."""

    def names(self, tls: ServerTLS) -> str:
        """Whom the certificate is for that a connection gets now."""
        connection = tls.serverConnectionForTLS(tls.wrap(Protocol()))
        certificate: Any = connection.get_certificate(as_cryptography=True)
        return str(certificate.subject.rfc4514_string())

    def test_reload(self) -> None:
        """New connections get what is in the files now, and the log says so."""
        tls = self.load()
        self.assertIn("CN=server", self.names(tls))
        self.files.write("server.pem", pem(issue("renewed")))
        with capturedLogs() as events:
            tls.reload()
        self.assertIn("CN=renewed", self.names(tls))
        (line,) = texts(list(events), LogLevel.info)
        expected = f"action: reload | result: success | tls_cert: {self.files.cert}"
        self.assertEqual(line, expected)

    def test_bad_files(self) -> None:
        """A file that cannot be used keeps all as it was, and the log says why."""
        tls = self.load(client_ca=self.files.client_ca)
        self.files.write("server.pem", pem(issue("renewed")))
        for name, option in (("ca.pem", "--tls-client-ca"), ("server.pem", "--tls-cert")):
            self.files.write(name, b"half a")
            with capturedLogs() as events:
                tls.reload()
            (line,) = texts(list(events), LogLevel.error)
            part = f"action: reload | result: fail | error: {option} {self.folder / name}: "
            self.assertIn(part, line)
            self.assertIn("CN=server", self.names(tls))

    def test_expired(self) -> None:
        """One that has expired meanwhile is taken, with a warning."""
        tls = self.load()
        self.files.write("server.pem", pem(issue("server", days=-1)))
        with capturedLogs() as events:
            tls.reload()
        self.assertEqual(len(texts(list(events), LogLevel.warn)), 1)
        self.assertEqual(len(texts(list(events), LogLevel.info)), 1)

    def test_nothing_is_left(self) -> None:
        """What was read before is let go of."""
        tls = self.load(client_ca=self.files.client_ca)
        held: list[Any] = [tls._options, tls._options.getContext()]
        before = [weakref.ref(each) for each in held]
        held.clear()
        for _ in range(20):
            tls.reload()
        gc.collect()
        self.assertEqual([each() for each in before], [None, None])

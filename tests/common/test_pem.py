"""PEM files: what they hold, and one line for each mistake in them."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from OpenSSL.SSL import Error
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.common.pem import PEMError, openssl_reason, read_identity, read_trust_root
from tests.support.certificates import Files, authority, issue, pem

SECP160R1 = b"""-----BEGIN EC PRIVATE KEY-----
MFECAQEEFQCuc0HhdtHvyxoQ6d3YvnxJTcXXTKAHBgUrgQQACKEsAyoABPR5ghrK
mbO8SHNp/fKB9xaPQ8IUS4AHzcTClU/vwrsOZUFyuNwh8Jc=
-----END EC PRIVATE KEY-----
"""
"""A key of 160 bits, made for this test alone."""


def key_file(key: Any, passphrase: bytes = b"") -> bytes:
    """The content of a file with a private key."""
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return data


class PEMTestCase(SynchronousTestCase):
    """A folder with a certificate, its key, and a CA."""

    def setUp(self) -> None:
        folder = Path(self.mktemp()).absolute()
        folder.mkdir()
        self.files = Files(folder)
        self.certificate = issue("server")
        self.cert = self.write("cert.pem", pem(self.certificate, with_key=False))
        self.key = self.write("key.pem", self.certificate.private_key_pem.bytes())

    def write(self, name: str, data: bytes) -> Path:
        """Write a file, and return its path."""
        return Path(self.files.write(name, data))

    def refused(self, path: Path, *parts: str) -> None:
        """Each option that the file fits refuses it in one line with these parts."""
        for option, read in (
            ("--tls-cert", lambda: read_identity(path, self.key)),
            ("--tls-ca", lambda: read_trust_root("--tls-ca", path)),
        ):
            self.assert_mistake(read, f"{option} {path}: ", *parts)

    def key_refused(self, path: Path, *parts: str) -> None:
        """The option of the key refuses a file in one line with these parts."""
        self.assert_mistake(lambda: read_identity(self.cert, path), f"--tls-key {path}: ", *parts)

    def assert_mistake(self, read: Any, *parts: str) -> None:
        """A mistake is told in one line that names the option, the file and the remedy."""
        error = self.assertRaises(PEMError, read)
        for part in parts:
            self.assertIn(part, str(error))
        self.assertRegex(str(error), r"^--tls-[a-z-]+ [^\n]+: [^\n]+: [^\n]+$")


class AcceptedTests(PEMTestCase):
    """Files that both sides accept."""

    def test_the_key_has_a_file_of_its_own_or_not(self) -> None:
        """Certificate and key may stand in two files, or in one, in either order."""
        chain, key = pem(self.certificate, with_key=False), self.key.read_bytes()
        expected = self.certificate.private_key_pem.bytes()
        for cert, key_path in (
            (self.cert, self.key),
            (self.write("both.pem", chain + key), None),
            (self.write("turned.pem", key + chain), None),
        ):
            read = read_identity(cert, key_path)["privateKey"]
            self.assertEqual(read.public_key(), load_pem_private_key(expected, None).public_key())

    def test_the_chain_follows_the_certificate(self) -> None:
        """The certificates between the first and its CA are read with it."""
        leaf = authority("ours").create_child_ca().issue_cert("localhost")
        identity = read_identity(self.write("chain.pem", pem(leaf)), None)
        issuers = [each.subject for each in identity["extraCertChain"]]
        self.assertEqual(issuers[0], identity["certificate"].issuer)

    def test_a_file_may_hold_several_cas(self) -> None:
        """All CAs of a bundle are trusted, as while one replaces another."""
        blobs = [authority(name).cert_pem.bytes() for name in ("ours", "theirs")]
        bundle = self.write("bundle.pem", b"".join(blobs))
        read_trust_root("--tls-ca", bundle)


class MistakeTests(PEMTestCase):
    """Files that cannot be used."""

    def test_unreadable_files(self) -> None:
        """A file may be missing, or be a folder."""
        missing, folder = self.files.folder / "missing.pem", self.files.folder
        for path, reason in ((missing, "No such file"), (folder, "Is a directory")):
            self.refused(path, reason)
            self.key_refused(path, reason)

    def test_files_of_another_user(self) -> None:
        """A file may not be readable for this process."""
        self.cert.chmod(0)
        if os.access(self.cert, os.R_OK):
            raise SkipTest("this user may read every file")
        self.refused(self.cert, "Permission denied", "may read")

    def test_files_without_pem(self) -> None:
        """A file may hold something else, half of a certificate, or a broken one."""
        whole = self.cert.read_bytes()
        for data in (
            b"",
            b"\x30\x82\x01",
            self.key.read_bytes(),
            whole[: len(whole) // 3],
            whole.replace(b"MII", b"MIX"),
        ):
            self.refused(self.write("bad.pem", data), "-----BEGIN CERTIFICATE-----")
        for data in (b"", b"secret", whole, b"-----BEGIN PRIVATE KEY-----\n"):
            self.key_refused(self.write("bad.pem", data), "no private key", "--tls-key")

    def test_a_certificate_without_its_key(self) -> None:
        """Where no option names the key, the error says which one does."""
        self.assert_mistake(
            lambda: read_identity(self.cert, None), "--tls-cert ", "no private key", "--tls-key"
        )

    def test_a_key_of_another_certificate(self) -> None:
        """A key may belong to another certificate, or be of another kind."""
        for key in (
            issue("other").private_key_pem.bytes(),
            key_file(generate_private_key(65537, 2048)),
        ):
            self.key_refused(self.write("other.pem", key), "does not belong", str(self.cert))

    def test_an_encrypted_key(self) -> None:
        """A key with a passphrase is refused: nobody may be there to be asked for it."""
        key = load_pem_private_key(self.key.read_bytes(), None)
        self.key_refused(self.write("locked.pem", key_file(key, b"secret")), "passphrase")

    def test_a_key_of_an_unsupported_kind(self) -> None:
        """A key on a curve that cryptography does not know is a mistake, not a traceback."""
        self.key_refused(self.write("short.pem", SECP160R1), "not supported", "RSA")

    def test_a_weak_certificate(self) -> None:
        """A certificate that OpenSSL does not accept is found before the first connection."""
        key = generate_private_key(65537, 1024)
        now = datetime.now(timezone.utc)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weak")])
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
        certificate = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
        path = self.write("weak.pem", certificate + key_file(key))
        self.assert_mistake(lambda: read_identity(path, None), "--tls-cert ", "key too small")

    def test_an_error_of_openssl_always_has_a_reason(self) -> None:
        """The last entry of OpenSSL's queue is the reason; an empty queue has a text too."""
        entries = [("lib", "function", "first"), ("lib", "function", "last")]
        self.assertEqual(openssl_reason(Error(entries)), "last")
        self.assertEqual(openssl_reason(Error()), "Error")

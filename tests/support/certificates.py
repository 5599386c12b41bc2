"""Certificates for tests: of a CA that is trusted, of another, expired, and clients' TLS."""

from __future__ import annotations

import ssl
import warnings
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import trustme

SERVER = "localhost"
"""Whom the server's certificate is for."""

AGENCY = "agency-7"
"""The common name of the clients' certificates."""


@cache
def authority(name: str) -> trustme.CA:
    """A CA; the same for the same name."""
    return trustme.CA(organization_name=name)


def issue(name: str = AGENCY, ca: str = "ours", *, days: int = 1) -> trustme.LeafCert:
    """A certificate with a common name, that is valid from two days ago for so many from now."""
    now = datetime.now(timezone.utc)
    return authority(ca).issue_cert(
        SERVER,
        common_name=name,
        not_before=now - timedelta(days=2),
        not_after=now + timedelta(days=days),
    )


def pem(certificate: trustme.LeafCert, *, with_key: bool = True) -> bytes:
    """A certificate with what is between it and its CA, as it stands in a file."""
    key = certificate.private_key_pem.bytes() if with_key else b""
    return key + b"".join(blob.bytes() for blob in certificate.cert_chain_pems)


class Files:
    """The files that a server is given.

    :ivar cert: its certificate, with the key.
    :ivar client_ca: the CA of its clients.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client_ca = self.write("ca.pem", authority("ours").cert_pem.bytes())
        self.cert = self.write("server.pem", pem(issue("server")))

    def write(self, name: str, data: bytes) -> str:
        """Write a file; its path."""
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


def client_context(
    certificate: trustme.LeafCert | None = None, trusted: str | None = "ours"
) -> ssl.SSLContext:
    """What a client speaks TLS with.

    :param certificate: that it shows.
    :param trusted: the CA that the server's certificate has to be of; ``None`` for any.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if trusted is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        authority(trusted).configure_trust(context)
    if certificate is not None:
        certificate.configure_cert(context)
    return context


def old_context() -> ssl.SSLContext:
    """The same for a client that speaks TLS 1.1 at most."""
    context = client_context(trusted=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


class MemoryClient:
    """A TLS client whose bytes are carried by the test.

    :param wire: the server's transport, whose protocol gets what the client says, and which
        has what the server says.
    """

    def __init__(self, wire: Any, context: ssl.SSLContext) -> None:
        self._wire = wire
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=SERVER)

    def hello(self) -> bytes:
        """What it says first."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def carry(self) -> None:
        """Take what the server has said, and hand over what is to be said."""
        self._incoming.write(self._wire.value())
        self._wire.clear()

    def handshake(self, first: bytes = b"") -> None:
        """Do the handshake as far as it goes.

        :param first: said before it, in the same chunk.
        :raises ssl.SSLError: if this side refuses it.
        """
        said = first + self.hello()
        for _ in range(4):
            self._say(said)
            self.carry()
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self._say(self._outgoing.read())
                raise
            said = self._outgoing.read()

    def send(self, data: bytes) -> None:
        """Say something."""
        self._tls.write(data)
        self._say(self._outgoing.read())

    def read(self) -> bytes:
        """What the server has said; empty if it has ended."""
        self.carry()
        return self._tls.read(1 << 16)

    def _say(self, data: bytes) -> None:
        if data:
            self._wire.protocol.dataReceived(data)

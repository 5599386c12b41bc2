"""Certificates for tests: of a trusted CA, of another, expired; and the client's side of TLS."""

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
"""The name in the server's certificate."""

AGENCY = "agency-7"
"""The common name of the clients' certificates."""


@cache
def authority(name: str) -> trustme.CA:
    """The CA of a name, always the same one."""
    return trustme.CA(organization_name=name)


def issue(name: str = AGENCY, ca: str = "ours", *, days: int = 1) -> trustme.LeafCert:
    """A certificate, valid from two days ago until some days from now."""
    now = datetime.now(timezone.utc)
    return authority(ca).issue_cert(
        SERVER,
        common_name=name,
        not_before=now - timedelta(days=2),
        not_after=now + timedelta(days=days),
    )


def pem(certificate: trustme.LeafCert, *, with_key: bool = True) -> bytes:
    """The content of a file with a certificate, the chain behind it, and its key."""
    key = certificate.private_key_pem.bytes() if with_key else b""
    return key + b"".join(blob.bytes() for blob in certificate.cert_chain_pems)


class Files:
    """A server's files.

    :ivar cert: its certificate, with the key.
    :ivar client_ca: the CA of its clients.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client_ca = self.write("ca.pem", authority("ours").cert_pem.bytes())
        self.cert = self.write("server.pem", pem(issue("server")))

    def write(self, name: str, data: bytes) -> str:
        """Write a file, and return its path."""
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


def client_context(
    certificate: trustme.LeafCert | None = None, trusted: str | None = "ours"
) -> ssl.SSLContext:
    """The context of a client's connections.

    :param certificate: the client's own; ``None`` if it has none.
    :param trusted: the CA that must have signed the server's certificate; ``None`` for any.
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
    """The context of a client that speaks TLS 1.1 at most."""
    context = client_context(trusted=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


class MemoryClient:
    """A TLS client in memory.

    :param wire: the server's transport, which delivers the client's bytes and holds the server's.
    """

    def __init__(self, wire: Any, context: ssl.SSLContext) -> None:
        self._wire = wire
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._is_secure = False
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=SERVER)

    def hello(self) -> bytes:
        """The first bytes of the handshake."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def carry(self) -> None:
        """Receive the bytes that the server has sent."""
        self._incoming.write(self._wire.value())
        self._wire.clear()

    def handshake(self, first: bytes = b"", cut: int = 0, with_end: bytes = b"") -> None:
        """Do the handshake as far as it goes.

        :param first: sent before the handshake.
        :param cut: the first bytes that are sent in a chunk of their own.
        :param with_end: sent by TLS in the chunk that finishes the handshake.
        :raises ssl.SSLError: if this side refuses it.
        """
        sent = first + self.hello()
        self._wire.deliver(sent[:cut])
        sent = sent[cut:]
        for _ in range(4):
            self._wire.deliver(sent)
            try:
                sent = self.answer(with_end)
            except ssl.SSLError:
                self._wire.deliver(self._outgoing.read())
                raise

    def answer(self, with_end: bytes = b"") -> bytes:
        """Receive the server's part of the handshake, and return what to send next.

        :param with_end: sent by TLS behind the end of the handshake.
        :raises ssl.SSLError: if this side refuses the server's part.
        """
        self.carry()
        if not self._is_secure:
            with suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                self._is_secure = True
                self._tls.write(with_end)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        """Send something by TLS."""
        self._tls.write(data)
        self._wire.deliver(self._outgoing.read())

    def read(self) -> bytes:
        """Receive what the server has sent; empty if it has closed TLS."""
        self.carry()
        return self._tls.read(1 << 16)

    def close(self) -> None:
        """Close TLS, and do not wait until the server does."""
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._wire.deliver(self._outgoing.read())

"""TLS on the sending side: how the server is verified, who this client is, what went wrong.

The extra ``tls`` brings pyOpenSSL and service-identity: they are imported where they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import clientFromString, wrapClientTLS
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from zope.interface import implementer

from cafeteria_orch.common.extras import how_to_install
from cafeteria_orch.common.pem import PEMError, openssl_reason, read_identity, read_trust_root

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from OpenSSL.crypto import X509
    from OpenSSL.SSL import Connection

# The alerts by which a server refuses a client's certificate, or the lack of one.
_CERTIFICATE_ALERTS = {
    "access denied",
    "bad certificate",
    "certificate expired",
    "certificate required",
    "certificate revoked",
    "certificate unknown",
    "decrypt error",
    # With TLS 1.2 a server that requires a certificate says no more than that.
    "handshake failure",
    "unknown ca",
    "unsupported certificate",
}
_VERSION_ALERTS = {"insufficient security", "protocol version"}


class TLSError(Exception):
    """A failure that a further attempt would repeat. Its text names the remedy."""


@implementer(IOpenSSLClientConnectionCreator)
class ClientTLS:
    """Makes the TLS connections to one server, and explains why the last one failed.

    The server must show a certificate for its host name, or for its address if ``hostname`` is
    one. The oldest version of TLS is 1.2.

    :param hostname: the server's host name or address.
    :param ca: the PEM file of the CAs that are trusted.
    :param cert: the PEM file of this client's certificate, and of those between it and its CA;
        ``None`` if it has none.
    :param key: the PEM file of its private key; ``None`` if ``cert`` holds it too.
    :raises TLSError: if a file cannot be used, or the extra is not installed.
    """

    def __init__(
        self, hostname: str, ca: Path, cert: Path | None = None, key: Path | None = None
    ) -> None:
        try:
            import OpenSSL  # noqa: F401, PLC0415
            import service_identity  # noqa: F401, PLC0415
        except ImportError as error:
            raise TLSError(
                f"--tls-ca needs what comes with the extra tls: {how_to_install('tls')}"
            ) from error
        from twisted.internet import ssl  # noqa: PLC0415

        self._hostname = hostname
        self._ca = ca
        self._cert = cert
        self._connection: Connection | None = None
        self._not_verified = ""
        try:
            self._creator = ssl.optionsForClientTLS(
                hostname,
                trustRoot=read_trust_root("--tls-ca", ca),
                extraCertificateOptions=None if cert is None else read_identity(cert, key),
            )
        except PEMError as error:
            raise TLSError(str(error)) from error
        except UnicodeError as error:
            raise TLSError(f"--connect: {hostname!r} is no host name: {error}") from error

    def wrap(self, endpoint: IStreamClientEndpoint) -> IStreamClientEndpoint:
        """Return an endpoint that connects to the same server by TLS."""
        return wrapClientTLS(self, endpoint)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> Connection:
        """Make the TLS side of a new connection, for Twisted."""
        from OpenSSL import SSL  # noqa: PLC0415

        self._not_verified = ""
        self._connection = self._creator.clientConnectionForTLS(tlsProtocol)
        # Twisted's own verification accepts a certificate that has no subjectAltName, or a
        # wildcard that it does not understand.
        self._connection.set_verify(SSL.VERIFY_PEER, self._verify)
        return self._connection

    def explain(self, error: Exception) -> str:
        """Describe a connection that could not be made, or has ended.

        :raises TLSError: if the next connection would fail in the same way.
        """
        from OpenSSL import SSL  # noqa: PLC0415

        connection, cause = self._connection, error.__cause__
        if connection is None or not isinstance(error, ConnectionClosed):
            return str(error)
        if isinstance(cause, SSL.Error):
            problem = self._problem(openssl_reason(cause), connection)
            if problem:
                raise TLSError(problem) from error
        elif connection.get_peer_finished() is None:
            return f"{error} The TLS handshake was not finished: does this server speak TLS?"
        return str(error)

    def _problem(self, reason: str, connection: Connection) -> str | None:
        if self._not_verified:
            return self._not_verified
        alert = reason.partition(" alert ")[2]
        if alert in _CERTIFICATE_ALERTS and self._cert is None:
            return (
                f"the server wants a certificate of this client ({alert}): name one that its CA"
                " has signed with --tls-cert"
            )
        if alert in _CERTIFICATE_ALERTS:
            return (
                f"the server refuses the certificate in {self._cert} ({alert}): name one that"
                " its CA has signed with --tls-cert"
            )
        if alert in _VERSION_ALERTS:
            return f"the server does not speak TLS 1.2 or newer ({alert}): upgrade it"
        if not alert and connection.get_peer_cert_chain(as_cryptography=True) is None:
            return (
                f"the server does not speak TLS ({reason}): leave out --tls-ca, or start the"
                " server with --tls-cert"
            )
        return None

    def _verify(self, _: Connection, shown: X509, number: int, depth: int, ok: int) -> bool:
        """Return whether a certificate is trusted: each of the chain, the server's own last.

        :param number: OpenSSL's error.
        :param ok: whether OpenSSL trusts the certificate.
        """
        certificate = shown.to_cryptography()
        if not ok:
            self._not_verified = self._distrust(certificate, number)
        elif depth == 0:
            self._not_verified = self._mismatch(certificate)
        return not self._not_verified

    def _distrust(self, certificate: Certificate, number: int) -> str:
        from OpenSSL.SSL import X509VerificationCodes as Codes  # noqa: PLC0415

        name, issuer = (
            side.rfc4514_string() for side in (certificate.subject, certificate.issuer)
        )
        if number == Codes.ERR_CERT_HAS_EXPIRED:
            end = certificate.not_valid_after_utc
            return f"the server's certificate, or its CA's, has expired: {name} at {end}; renew it"
        if number == Codes.ERR_CERT_NOT_YET_VALID:
            start = certificate.not_valid_before_utc
            return (
                f"the server's certificate, or its CA's, is not valid yet: {name} before {start};"
                " is the clock of this machine right?"
            )
        return (
            f"the server's certificate is not signed by a CA in {self._ca}, but by {issuer}"
            f" (OpenSSL's verification error {number}): name the file of its CA with --tls-ca"
        )

    def _mismatch(self, certificate: Certificate) -> str:
        """Return why a certificate is not the server's; the empty string if it is."""
        from service_identity.cryptography import (  # noqa: PLC0415
            verify_certificate_hostname,
            verify_certificate_ip_address,
        )

        is_address = isIPAddress(self._hostname) or isIPv6Address(self._hostname)
        verify = verify_certificate_ip_address if is_address else verify_certificate_hostname
        names: list[str] = []
        try:
            names = _names(certificate)
            verify(certificate, self._hostname)
        except Exception:
            # A certificate that cannot be understood is not accepted either.
            return (
                f"the server's certificate is not for {self._hostname} but for"
                f" {', '.join(names) or 'no host at all'}: say --connect with a name that it has"
            )
        return ""


def host_of(connect: str) -> str | None:
    """Return the host of a Twisted endpoint for TCP; ``None`` for an endpoint of another kind."""
    if connect.partition(":")[0].lower() != "tcp":
        return None
    probe = _HostProbe()
    clientFromString(probe, connect).connect(Factory())
    return probe.host


class _HostProbe:
    """Stands in for an endpoint's reactor, and keeps the host that it would connect to."""

    host = ""

    def connectTCP(self, host: str, *_: object, **__: object) -> None:
        self.host = host


def _names(certificate: Certificate) -> list[str]:
    from cryptography import x509  # noqa: PLC0415

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    names = extension.value
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]

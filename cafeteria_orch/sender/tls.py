"""TLS on the sending side: who the server has to be, who this client is, what went wrong.

What comes with the extra ``tls`` is imported where it is used: without TLS, nothing needs it.
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

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from OpenSSL.crypto import X509
    from OpenSSL.SSL import Connection

# What a server says of a client's certificate, or of there being none, in the words of OpenSSL.
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
    """What would end the same way if it were tried again. Its text has the remedy."""


@implementer(IOpenSSLClientConnectionCreator)
class ClientTLS:
    """Makes the TLS connections to one server, and knows why the last one has failed.

    The server has to have a certificate for its host name, or for its address where it is
    named by that. TLS 1.2 is the oldest version that Twisted speaks.

    :param hostname: of the server.
    :param ca: the file with the certificates of the CAs that are trusted, in PEM form.
    :param cert: the file with this client's certificate and those between it and its CA;
        ``None`` if it has none.
    :param key: the file with its private key; ``None`` if that is in the same file.
    :raises TLSError: if one of the files cannot be used, or the extra is not installed.
    """

    def __init__(
        self, hostname: str, ca: Path, cert: Path | None = None, key: Path | None = None
    ) -> None:
        try:
            import OpenSSL  # noqa: F401, PLC0415
            import service_identity  # noqa: F401, PLC0415
        except ImportError as error:
            raise TLSError(
                "--tls-ca needs what comes with the extra tls: pip install 'Twisted[tls]'"
            ) from error
        from twisted.internet import ssl  # noqa: PLC0415

        self._hostname = hostname
        self._ca = ca
        self._cert = cert
        self._connection: Connection | None = None
        self._not_verified = ""
        trusted = [
            ssl.Certificate.loadPEM(_as_pem(certificate))
            for certificate in _read_certificates("--tls-ca", ca)
        ]
        try:
            self._creator = ssl.optionsForClientTLS(
                hostname,
                trustRoot=ssl.trustRootFromCertificates(trusted),
                extraCertificateOptions=None if cert is None else _read_identity(cert, key),
            )
        except UnicodeError as error:
            raise TLSError(f"--connect: {hostname!r} is no host name: {error}") from error

    def wrap(self, endpoint: IStreamClientEndpoint) -> IStreamClientEndpoint:
        """The same server, by TLS."""
        return wrapClientTLS(self, endpoint)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> Connection:
        """Twisted asks for one with every connection."""
        from OpenSSL import SSL  # noqa: PLC0415

        self._not_verified = ""
        self._connection = self._creator.clientConnectionForTLS(tlsProtocol)
        # In the place of Twisted's own verification, which lets a certificate pass that has no
        # subjectAltName at all, or one with a wildcard that it does not understand.
        self._connection.set_verify(SSL.VERIFY_PEER, self._verify)
        return self._connection

    def explain(self, error: Exception) -> str:
        """What to say of a connection that could not be made, or has ended.

        :raises TLSError: if the next one would end in the same way.
        """
        from OpenSSL import SSL  # noqa: PLC0415

        connection, cause = self._connection, error.__cause__
        if connection is None or not isinstance(error, ConnectionClosed):
            return str(error)
        if isinstance(cause, SSL.Error):
            problem = self._problem(_reason(cause), connection)
            if problem:
                raise TLSError(problem) from error
        elif connection.get_peer_finished() is None:
            return f"{error} The TLS handshake was not done yet: does this server speak TLS?"
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
            return f"the server speaks no TLS that is new enough ({alert}): it has to speak 1.2"
        if not alert and connection.get_peer_cert_chain(as_cryptography=True) is None:
            return (
                f"the server does not speak TLS ({reason}): leave out --tls-ca, or have it do so"
            )
        return None

    def _verify(self, _: Connection, shown: X509, number: int, depth: int, ok: int) -> bool:
        """OpenSSL asks for each certificate of the chain; the last one is the server's.

        :param number: OpenSSL's error.
        :param ok: whether it has found none.
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
        """Why a certificate is not the server's; empty if it is."""
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
            # Whatever is strange about it: only a certificate that is understood is accepted.
            return (
                f"the server's certificate is not for {self._hostname} but for"
                f" {', '.join(names) or 'no host at all'}: say --connect with a name that it has"
            )
        return ""


def host_of(connect: str) -> str | None:
    """The host of a Twisted endpoint for TCP; ``None`` if it is one of another kind."""
    if connect.partition(":")[0].lower() != "tcp":
        return None
    probe = _HostProbe()
    clientFromString(probe, connect).connect(Factory())
    return probe.host


class _HostProbe:
    """What an endpoint takes for a reactor: keeps the host that it would connect to."""

    host = ""

    def connectTCP(self, host: str, *_: object, **__: object) -> None:
        self.host = host


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TLSError(f"{option} {path}: {error.strerror}") from error


def _read_certificates(option: str, path: Path) -> list[Certificate]:
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.load_pem_x509_certificates(_read(option, path))
    except ValueError as error:
        raise TLSError(f"{option} {path}: there is no certificate in PEM form in it") from error


def _read_identity(cert: Path, key: Path | None) -> dict[str, Any]:
    """What Twisted's ``CertificateOptions`` takes for them."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    own, *others = _read_certificates("--tls-cert", cert)
    option, path = ("--tls-cert", cert) if key is None else ("--tls-key", key)
    try:
        private_key = load_pem_private_key(_read(option, path), None)
    except TypeError as error:
        raise TLSError(
            f"{option} {path}: its private key has a passphrase, which nobody is asked for:"
            " give one without"
        ) from error
    except ValueError as error:
        remedy = "; name its file with --tls-key" if key is None else ""
        raise TLSError(
            f"{option} {path}: there is no private key in PEM form in it{remedy}"
        ) from error
    if private_key.public_key() != own.public_key():
        raise TLSError(
            f"{option} {path}: its private key is not that of the certificate in {cert}:"
            " name the one that belongs to it with --tls-key"
        )
    return {
        "certificate": own,
        "privateKey": private_key,
        "extraCertChain": others,
    }


def _as_pem(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    return certificate.public_bytes(Encoding.PEM)


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


def _reason(error: Exception) -> str:
    """The last thing that OpenSSL has said of an error."""
    # Its argument is a list of (library, function, reason).
    match error.args:
        case ([*_, (_, _, str(reason))],):
            return reason
    return str(error)

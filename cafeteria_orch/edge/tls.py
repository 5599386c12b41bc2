"""TLS on the listening side: the server's certificates, who a client is, why a handshake failed.

The extra ``tls`` brings pyOpenSSL: it is imported where it is used.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.common.extras import how_to_install
from cafeteria_orch.common.pem import PEMError, openssl_reason, read_identity, read_trust_root

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from OpenSSL.SSL import Connection
    from twisted.internet.ssl import CertificateOptions

# Why a handshake failed, in the words of OpenSSL and in ours.
_PROBLEMS = {
    "peer did not return a certificate": "it showed no certificate",
    "unsupported protocol": "it does not speak TLS 1.2 or newer",
    "no shared cipher": "it supports none of the ciphers",
}

_log = Logger()


@implementer(IOpenSSLServerConnectionCreator)
class ServerTLS:
    """Makes the server's side of TLS connections, of version 1.2 or newer.

    :param wall_time: tells whether a certificate is valid.
    :param cert: the PEM file of the server's certificate, and of those between it and its CA.
    :param key: the PEM file of its private key; ``None`` if ``cert`` holds it too.
    :param client_ca: the PEM file of the CAs of clients, each of which must then show a
        certificate; ``None`` asks for no certificate.
    :raises PEMError: if a file cannot be used, or the extra is not installed.
    """

    def __init__(
        self, wall_time: WallTime, cert: str, key: str | None = None, client_ca: str | None = None
    ) -> None:
        self._wall_time = wall_time
        self._cert = Path(cert)
        self._key = Path(key) if key else None
        self._client_ca = Path(client_ca) if client_ca else None
        try:
            import OpenSSL  # noqa: F401, PLC0415
        except ImportError as error:
            raise PEMError(
                f"--tls-cert needs what comes with the extra tls: {how_to_install('tls')}"
            ) from error
        self._options = self._load()

    def serverConnectionForTLS(self, tlsProtocol: Any) -> Connection:
        """Make the TLS side of a new connection, for Twisted."""
        return self._options.serverConnectionForTLS(tlsProtocol)

    def reload(self) -> None:
        """Read the files again, for connections to come; open connections stay as they are.

        If a file cannot be used, log an error and keep what was read before.
        """
        try:
            self._options = self._load()
        except PEMError as error:
            _log.error("action: reload | result: fail | error: {error}", error=error)
        else:
            _log.info("action: reload | result: success | tls_cert: {cert}", cert=self._cert)

    def _load(self) -> CertificateOptions:
        from OpenSSL import SSL  # noqa: PLC0415
        from twisted.internet import ssl  # noqa: PLC0415

        identity = read_identity(self._cert, self._key)
        trusted = None
        if self._client_ca is not None:
            trusted = read_trust_root("--tls-client-ca", self._client_ca)
        options = ssl.CertificateOptions(
            **identity, trustRoot=trusted, raiseMinimumTo=ssl.TLSVersion.TLSv1_2
        )
        if trusted is not None:
            required = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
            options.getContext().set_verify(required, _note_distrust)
        self._warn_of_dates(identity["certificate"])
        return options

    def _warn_of_dates(self, certificate: Certificate) -> None:
        now = datetime.fromtimestamp(self._wall_time(), timezone.utc)
        problem = ""
        if certificate.not_valid_after_utc < now:
            problem = f"it has expired at {certificate.not_valid_after_utc}: renew it"
        elif now < certificate.not_valid_before_utc:
            problem = f"it is not valid before {certificate.not_valid_before_utc}"
        if problem:
            _log.warn(
                "action: read_certificate | result: success | tls_cert: {cert} | error: {error},"
                " clients will refuse it",
                cert=self._cert,
                error=problem,
            )


def common_name(connection: Connection) -> str | None:
    """Return the common name in a client's certificate; ``None`` without one.

    Unprintable characters are escaped, and so are the backslash and the bar that separates the
    fields of a log line.
    """
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        certificate = connection.get_peer_certificate(as_cryptography=True)
        if certificate is None:
            return None
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        # The last of several is the most specific.
        name = names[-1].value if names else ""
    except ValueError:
        # OpenSSL accepts certificates that cryptography cannot parse.
        return None
    return "".join(map(_escaped, str(name))) or None


def handshake_problem(failure: Failure, connection: Connection) -> str | None:
    """Return why a handshake failed; ``None`` if the client only closed the connection.

    :return: one of a few texts, which contain nothing that a client wrote.
    """
    from OpenSSL import SSL  # noqa: PLC0415

    error = failure.value
    if not isinstance(error, SSL.Error):
        return None
    distrust = connection.get_app_data()
    if isinstance(distrust, str):
        return distrust
    reason = openssl_reason(error)
    alert = reason.partition(" alert ")[2]
    if alert:
        return f"it refuses this server: {alert}"
    return _PROBLEMS.get(reason, f"TLS failed: {reason}")


def _note_distrust(connection: Connection, _: object, number: int, __: int, ok: int) -> bool:
    """Keep why OpenSSL does not trust a certificate of a client's chain.

    :param number: OpenSSL's error.
    :param ok: whether OpenSSL trusts the certificate.
    """
    from OpenSSL.SSL import X509VerificationCodes as Codes  # noqa: PLC0415

    if not ok:
        problem = f"OpenSSL does not trust its certificate (verification error {number})"
        if number == Codes.ERR_CERT_HAS_EXPIRED:
            problem = "its certificate, or the CA's, has expired"
        elif number == Codes.ERR_CERT_NOT_YET_VALID:
            problem = "its certificate, or the CA's, is not valid yet"
        elif number in {
            Codes.ERR_UNABLE_TO_GET_ISSUER_CERT,
            Codes.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
            Codes.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
            Codes.ERR_DEPTH_ZERO_SELF_SIGNED_CERT,
            Codes.ERR_SELF_SIGNED_CERT_IN_CHAIN,
            Codes.ERR_CERT_SIGNATURE_FAILURE,
        }:
            problem = "its certificate is of no CA in --tls-client-ca"
        connection.set_app_data(problem)
    return bool(ok)


def _escaped(character: str) -> str:
    if character.isprintable() and character not in "\\|":
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 1 << 8 else f"\\u{number:04x}"

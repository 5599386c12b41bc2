"""TLS on the listening side: certificates from files, who a client is, why a handshake failed.

What comes with the extra ``tls`` is imported where it is used: without TLS, nothing needs it.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IOpenSSLServerConnectionCreator, IProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from OpenSSL.SSL import Connection
    from twisted.internet.ssl import CertificateOptions
    from twisted.protocols.tls import TLSMemoryBIOProtocol

# What can be wrong with a client, in the words of OpenSSL, and in ours.
_REASONS = {
    "peer did not return a certificate": "it has shown no certificate",
    "unsupported protocol": "it speaks no TLS from version 1.2 on",
    "no shared cipher": "it knows none of the ciphers",
}

_log = Logger()


class CertificateError(Exception):
    """Certificates that cannot be used. Its text names the option, the file and the remedy."""


@implementer(IOpenSSLServerConnectionCreator)
class ServerTLS:
    """Makes the server's side of TLS connections, of version 1.2 at least.

    :param reactor: for the time.
    :param cert: the file with the server's certificate and those between it and its CA, in PEM
        form.
    :param key: the file with its private key; ``None`` if that is in the same file.
    :param client_ca: the file with the certificates of the CAs of clients, which have to show
        a certificate then; ``None`` to ask for none.
    :raises CertificateError: if a file cannot be used, or the extra is not installed.
    """

    def __init__(
        self, reactor: Any, cert: str, key: str | None = None, client_ca: str | None = None
    ) -> None:
        self._reactor = reactor
        self._cert = Path(cert)
        self._key = Path(key or cert)
        self._key_option = "--tls-key" if key else "--tls-cert"
        self._client_ca = client_ca and Path(client_ca)
        try:
            import OpenSSL  # noqa: F401, PLC0415
        except ImportError as error:
            raise CertificateError(
                "--tls-cert needs what comes with the extra tls: pip install 'cafeteria_orch[tls]'"
            ) from error
        from twisted.protocols.tls import TLSMemoryBIOFactory  # noqa: PLC0415

        self._options = self._load()
        self._factory = TLSMemoryBIOFactory(self, False, None, reactor)  # type: ignore[arg-type]

    def wrap(self, protocol: IProtocol) -> TLSMemoryBIOProtocol:
        """Have a protocol speak by TLS: what is returned stands between it and its transport."""
        return self._factory.protocol(self._factory, protocol)

    def serverConnectionForTLS(self, tlsProtocol: Any) -> Connection:
        """Twisted asks for one with every connection."""
        return self._options.serverConnectionForTLS(tlsProtocol)

    def reload(self) -> None:
        """Read the files again, for the connections to come.

        Those there are go on. If one of the files cannot be used, all is kept as it is, and an
        error is logged.
        """
        try:
            self._options = self._load()
        except CertificateError as error:
            _log.error("action: reload | result: fail | error: {error}", error=error)
        else:
            _log.info("action: reload | result: success | tls_cert: {cert}", cert=self._cert)

    def _load(self) -> CertificateOptions:
        from OpenSSL import SSL, crypto  # noqa: PLC0415
        from twisted.internet import ssl  # noqa: PLC0415

        chain = _read_certificates("--tls-cert", self._cert)
        key = _read_key(self._key_option, self._key)
        trusted = None
        if self._client_ca:
            trusted = ssl.trustRootFromCertificates(
                [
                    ssl.Certificate(crypto.X509.from_cryptography(each))
                    for each in _read_certificates("--tls-client-ca", self._client_ca)
                ]
            )
        # Twisted passes on what it is given, and pyOpenSSL wants these of cryptography's.
        certificate: list[Any] = list(chain)
        options = ssl.CertificateOptions(
            privateKey=key,
            certificate=certificate[0],
            extraCertChain=certificate[1:],
            trustRoot=trusted,
            raiseMinimumTo=ssl.TLSVersion.TLSv1_2,
        )
        try:
            context = options.getContext()
        except (SSL.Error, TypeError) as error:
            raise CertificateError(
                f"{self._key_option} {self._key}: TLS does not take its key with the certificate"
                f" in {self._cert} ({_reason_of(error)}): name the key that the certificate was"
                " made with by --tls-key"
            ) from error
        if trusted is not None:
            required = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
            context.set_verify(required, _note_mistrust)
        self._warn_of_dates(chain[0])
        return options

    def _warn_of_dates(self, certificate: Certificate) -> None:
        now = datetime.fromtimestamp(self._reactor.seconds(), timezone.utc)
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
    """The name in the certificate that a client has shown; ``None`` if it has none.

    What is not printable in it is escaped, and so are the backslash and the bar that stands
    between the fields of a log line.
    """
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        certificate = connection.get_peer_certificate(as_cryptography=True)
        if certificate is None:
            return None
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        # Of several, the last one says it most precisely.
        name = names[-1].value if names else ""
    except ValueError:
        # OpenSSL bears with more than what makes a certificate of these bytes.
        return None
    return "".join(map(_escaped, str(name))) or None


def handshake_problem(failure: Failure, connection: Connection) -> str | None:
    """Why a handshake has failed; ``None`` if the client has only gone away.

    :return: one of a few texts, with nothing that the client could have written.
    """
    from OpenSSL import SSL  # noqa: PLC0415

    error = failure.value
    if not isinstance(error, SSL.Error):
        return None
    mistrust = connection.get_app_data()
    if isinstance(mistrust, str):
        return mistrust
    reason = _reason_of(error)
    alert = reason.partition(" alert ")[2]
    if alert:
        return f"it refuses this server: {alert}"
    return _REASONS.get(reason, f"no TLS: {reason}")


def _note_mistrust(connection: Connection, _: object, number: int, __: int, ok: int) -> bool:
    """OpenSSL asks for each certificate of a client.

    :param number: OpenSSL's error.
    :param ok: whether it has found none.
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


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"{option} {path}: {error.strerror}: name a file that this server may read"
        ) from error


def _read_certificates(option: str, path: Path) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    data = _read(option, path)
    try:
        return load_pem_x509_certificates(data)
    except ValueError as error:
        raise CertificateError(
            f"{option} {path}: there is no certificate in PEM form in it (or a broken one): it"
            " has to begin with -----BEGIN CERTIFICATE-----"
        ) from error


def _read_key(option: str, path: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_private_key,
    )

    data = _read(option, path)
    try:
        # Not by OpenSSL's own function: that asks the terminal for a passphrase.
        return load_pem_private_key(data, None)
    except TypeError as error:
        raise CertificateError(
            f"{option} {path}: the private key is encrypted: name one by --tls-key that is not"
        ) from error
    except ValueError as error:
        raise CertificateError(
            f"{option} {path}: there is no private key in PEM form in it: name its file by"
            " --tls-key"
        ) from error


def _reason_of(error: Exception) -> str:
    errors = error.args[0] if error.args else None
    # One of OpenSSL's entries is library, function, reason.
    return str(errors[-1][-1]) if isinstance(errors, list) and errors else type(error).__name__


def _escaped(character: str) -> str:
    if character.isprintable() and character not in "\\|":
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 1 << 8 else f"\\u{number:04x}"

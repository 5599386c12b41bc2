"""Certificates and private keys from the PEM files that options name.

The extra ``tls`` brings what reads them: it is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


class PEMError(Exception):
    """A file that cannot be used. Its text names the option, the file and the remedy."""


def read_trust_root(option: str, path: Path) -> Any:
    """Read the certificates of CAs, for the ``trustRoot`` of Twisted's ``CertificateOptions``.

    :param option: names the file in an error.
    :raises PEMError: if the file cannot be used.
    """
    from OpenSSL.crypto import X509  # noqa: PLC0415
    from twisted.internet import ssl  # noqa: PLC0415

    certificates = _read_certificates(option, path)
    return ssl.trustRootFromCertificates(
        [ssl.Certificate(X509.from_cryptography(each)) for each in certificates]
    )


def read_identity(cert: Path, key: Path | None) -> dict[str, Any]:
    """Read the files of ``--tls-cert`` and ``--tls-key``.

    :param cert: holds a certificate, and those between it and its CA.
    :param key: holds the private key; ``None`` if ``cert`` holds it too.
    :return: the keyword arguments of Twisted's ``CertificateOptions``.
    :raises PEMError: if a file cannot be used, or the two do not belong together.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415

    option, path = ("--tls-cert", cert) if key is None else ("--tls-key", key)
    certificate, *chain = _read_certificates("--tls-cert", cert)
    try:
        private_key = _read_private_key(option, path)
        belong_together = private_key.public_key() == certificate.public_key()
    except UnsupportedAlgorithm as error:
        raise PEMError(
            f"{option} {path}: keys of this kind are not supported: use an RSA or a P-256 key"
        ) from error
    if not belong_together:
        raise PEMError(
            f"{option} {path}: its private key does not belong to the certificate in {cert}:"
            " name the key that does with --tls-key"
        )
    identity = {"certificate": certificate, "privateKey": private_key, "extraCertChain": chain}
    _check_acceptance(cert, identity)
    return identity


def openssl_reason(error: Exception) -> str:
    """Return the last thing that OpenSSL said of an error."""
    match error.args:
        case ([*_, (_library, _function, reason)],):
            return str(reason)
    return str(error) or type(error).__name__


def _check_acceptance(cert: Path, identity: dict[str, Any]) -> None:
    from OpenSSL import SSL  # noqa: PLC0415
    from twisted.internet import ssl  # noqa: PLC0415

    # Twisted's client makes its context at the first connection, too late to tell the user.
    try:
        ssl.CertificateOptions(**identity).getContext()
    except SSL.Error as error:
        raise PEMError(
            f"--tls-cert {cert}: OpenSSL does not accept the certificate"
            f" ({openssl_reason(error)}): name another one"
        ) from error


def _read_bytes(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PEMError(
            f"{option} {path}: {error.strerror}: name a file that this process may read"
        ) from error


def _read_certificates(option: str, path: Path) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    data = _read_bytes(option, path)
    try:
        return load_pem_x509_certificates(data)
    except ValueError as error:
        raise PEMError(
            f"{option} {path}: there is no certificate in PEM form in it, or a broken one: a"
            " certificate begins with -----BEGIN CERTIFICATE-----"
        ) from error


def _read_private_key(option: str, path: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_private_key,
    )

    data = _read_bytes(option, path)
    try:
        # OpenSSL's own function would ask the terminal for a passphrase.
        return load_pem_private_key(data, None)
    except TypeError as error:
        raise PEMError(
            f"{option} {path}: the private key is encrypted, and nobody is asked for its"
            " passphrase: name one without a passphrase with --tls-key"
        ) from error
    except ValueError as error:
        raise PEMError(
            f"{option} {path}: there is no private key in PEM form in it: name its file with"
            " --tls-key"
        ) from error

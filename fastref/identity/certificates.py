"""Certificates for tests and small clusters, made in one call."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastref.errors import ResourceError, UsageError
from fastref.options import TlsFiles

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["self_made_certificates"]

_CLOCKS_MAY_DIFFER = datetime.timedelta(days=1)


def self_made_certificates(directory: str | os.PathLike[str], *, valid_days: int = 365) -> TlsFiles:
    """Make an authority, one certificate of it that all workers use, and its key, and write them into ``directory``.

    Copy the directory to every host of the job, or put it where all see it. The authority's own key is thrown away: no
    second certificate of it will ever exist, so whoever shows one has the key of this one.

    Parameters
    ----------
    directory : path
        Made with mode 0700 if it is not there; ``authority.pem``, ``certificate.pem`` and ``key.pem`` must not be
        in it.
    valid_days : int
        From now on, in days.

    Returns
    -------
    TlsFiles
        For ``RpcBackendOptions(tls=...)``.

    Raises
    ------
    UsageError
        The package ``cryptography`` is not installed, or one of the files is there already.
    ResourceError
        A file cannot be written.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError as error:
        raise UsageError(
            "making certificates needs the package cryptography: pip install 'fastref[tls]'. "
            "To use certificates that you have needs nothing."
        ) from error

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name, name = _name("fastref job authority"), _name("fastref worker")
    authority_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    now = datetime.datetime.now(datetime.UTC)

    def begin(subject: x509.Name) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCKS_MAY_DIFFER)
            .not_valid_after(now + datetime.timedelta(days=valid_days))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False)
        )

    authority = (
        begin(authority_name)
        .public_key(authority_key.public_key())
        .add_extension(authority_id, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        begin(name)
        .public_key(key.public_key())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("fastref-worker")]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _write(Path(directory), certificate.public_bytes(pem), private, authority.public_bytes(pem))


def _write(directory: Path, certificate: bytes, key: bytes, authority: bytes) -> TlsFiles:
    contents = {"certificate.pem": certificate, "key.pem": key, "authority.pem": authority}
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in contents.items():
            fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
    except FileExistsError as error:
        raise UsageError(f"{error.filename} is there already; name another directory, or use what is there") from error
    except OSError as error:
        raise ResourceError(f"cannot write certificates into {directory}: {error.strerror}") from error
    return TlsFiles(*(directory / name for name in contents))


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )

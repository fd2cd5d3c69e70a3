"""TLS certificates for a trial: an authority of one's own, and the coordinator's certificate.

An institution with an authority of its own uses that instead; nothing here is needed then.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.keys import read_key_file, write_key_files

__all__ = [
    "check_authorities",
    "check_certificate",
    "hosts_of",
    "make_certificates",
    "make_next_certificate",
    "parse_authorities",
]

_AUTHORITY_DAYS = 3650
_DAYS = 825
_LOCAL = ("localhost", "127.0.0.1")
_SKEW = timedelta(minutes=10)  # a site's clock may be behind


def make_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Make an authority, and a certificate of the coordinator under it.

    Args:
        folder: Receives ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key``.
        hosts: Names and addresses that sites reach the coordinator by; ``localhost`` and
            ``127.0.0.1`` are always among them.

    Raises:
        Refused: LF4156, a file exists; LF4157, a file cannot be written; LF4162, a host is neither
            a name nor an address.
    """
    now = datetime.now(UTC)
    names = _general_names(hosts)
    authority_key = generate_private_key(SECP384R1())
    authority_name = _name("lepton-fed trial authority")
    authority = (
        _builder(authority_name, authority_name, authority_key, now, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    write_key_files(
        {
            folder / "ca.key": (_private(authority_key), 0o600),
            folder / "ca.crt": (authority.public_bytes(serialization.Encoding.PEM), 0o644),
            **_server_files(folder, authority, authority_key, names, now),
        }
    )


def make_next_certificate(
    authority: Path, folder: Path, hosts: Sequence[str] = (), now: datetime | None = None
) -> list[str]:
    """Make another certificate of the coordinator, with a key of its own, under one authority.

    Args:
        authority: Folder of the authority, as :func:`make_certificates` made it.
        folder: Receives ``server.crt`` and ``server.key``.
        hosts: Names and addresses that sites reach the coordinator by; none for those of the
            certificate in the authority's folder.
        now: Present time.

    Returns:
        The names and addresses that it is for.

    Raises:
        Refused: LF4151, LF4152 or LF4157, a file is missing, open to others, or cannot be read;
            LF4153, LF4163, it is not what it should be; LF4156, LF4157 or LF4162 as in
            :func:`make_certificates`; LF4178, the key is not the authority's.
    """
    issuer = _certificate(authority / "ca.crt")
    content = read_key_file(authority / "ca.key", private=True)
    try:
        key = serialization.load_pem_private_key(content, None)
    except (TypeError, ValueError):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        what = "this is no private key of an authority that `lepton-fed keys coordinator` made"
        remedy = "have your own authority make the certificate"
        raise _refused("LF4153", what, authority / "ca.key", remedy)
    if key.public_key() != issuer.public_key():
        what, remedy = "the key is not that of ca.crt beside it", "put both of one pair in place"
        raise _refused("LF4178", what, authority / "ca.key", remedy)
    names = _general_names(hosts or hosts_of(_certificate(authority / "server.crt")))
    write_key_files(_server_files(folder, issuer, key, names, now or datetime.now(UTC)))
    return hosts_of(_certificate(folder / "server.crt"))


def _server_files(
    folder: Path,
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    now: datetime,
) -> dict[Path, tuple[bytes, int]]:
    key = generate_private_key(SECP384R1())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        _builder(_name("lepton-fed coordinator"), authority.subject, key, now, _DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    return {
        folder / "server.key": (_private(key), 0o600),
        folder / "server.crt": (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
    }


def check_certificate(path: Path, host: str | None = None, now: datetime | None = None) -> str:
    """Return until when a certificate is valid, as text.

    Args:
        path: The certificate, PEM.
        host: Name or address that it must be for; None does not ask.
        now: Present time.

    Raises:
        Refused: LF4151 or LF4157, it cannot be read; LF4163, it is no certificate; LF4164, it is
            not valid now; LF4165, it is for other hosts.
    """
    certificate = _certificate(path)
    now = now or datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        what = (
            f"the certificate is valid {first:%Y-%m-%d} to {last:%Y-%m-%d}; now is {now:%Y-%m-%d}"
        )
        raise _refused("LF4164", what, path, "set the clock, or have a new one made")
    if host is not None and host not in hosts_of(certificate):
        known = ", ".join(hosts_of(certificate)) or "none"
        what = f"the certificate is not for {host}; its hosts: {known}"
        raise _refused("LF4165", what, path, "make one with --host, or use a host that it is for")
    return f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"


def parse_authorities(content: bytes, path: Path) -> list[x509.Certificate]:
    """Return the certificates in a file, each of them whole.

    Args:
        content: The file.
        path: Where it was found, for the message.

    Raises:
        Refused: LF4163, it holds no certificate, or something that is none.
    """
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        found = []
    if not found or len(found) != content.count(b"-----BEGIN CERTIFICATE-----"):
        what = "this holds no certificate in PEM form, or half of one"
        raise _refused("LF4163", what, path, "check the path, or fetch it again")
    return found


def check_authorities(path: Path, now: datetime | None = None) -> str:
    """Return until when the certificates of authorities in a file are valid, as text.

    There is one, or two while one authority takes over from another; the old one may have ended.

    Args:
        path: The certificates, PEM, one after another.
        now: Present time.

    Raises:
        Refused: LF4151 or LF4157, it cannot be read; LF4163, it holds no certificate, or something
            that is none; LF4164, none of them is valid now.
    """
    found = parse_authorities(read_key_file(path, private=False), path)
    now = now or datetime.now(UTC)
    valid = [c for c in found if c.not_valid_before_utc <= now <= c.not_valid_after_utc]
    if not valid:
        ends = ", ".join(f"{c.not_valid_after_utc:%Y-%m-%d}" for c in found)
        what = f"no authority in this file is valid now ({now:%Y-%m-%d}); they end {ends}"
        raise _refused("LF4164", what, path, "set the clock, or fetch the new ca.crt")
    ends = " and ".join(sorted(f"{c.not_valid_after_utc:%Y-%m-%d}" for c in valid))
    return f"valid until {ends}"


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(read_key_file(path, private=False))
    except ValueError:
        raise _refused(
            "LF4163", "this is no certificate in PEM form", path, "check the path"
        ) from None


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the names and addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = found.get_values_for_type(x509.IPAddress)
    return [*found.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    return [_general_name(host) for host in dict.fromkeys((*hosts, *_LOCAL))]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        if not host or any(c.isspace() or c in "/:@" for c in host):
            raise ValueError
        return x509.DNSName(host)
    except ValueError:
        raise Refused(
            Problem("LF4162", f"{host!r} is neither a host's name nor an address", key="--host",
                    remedy="write fed.example.org or 10.0.0.5, without a port")
        ) from None  # fmt: skip


def _private(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _refused(code: str, what: str, path: Path, remedy: str) -> Refused:
    return Refused(Problem(code, what, where=str(path), remedy=remedy))

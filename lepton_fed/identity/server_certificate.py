"""The coordinator's TLS certificate with its key, as they are shown to whoever connects."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.certificates import check_certificate, hosts_of
from lepton_fed.identity.keys import read_key_file

__all__ = ["ServerCertificate", "load_server_certificate"]


@dataclass(frozen=True)
class ServerCertificate:
    """A certificate that can be shown.

    Args:
        context: Shows it in a handshake.
        digest: SHA-256 of the certificate's and the key's file, hexadecimal.
        chain: The certificate, and those between it and its authority that came with it.
    """

    context: ssl.SSLContext
    digest: str
    chain: tuple[x509.Certificate, ...]

    @property
    def hosts(self) -> list[str]:
        """Return the names and addresses that it is for."""
        return hosts_of(self.chain[0])

    @property
    def ends(self) -> datetime:
        """Return when it is valid no more."""
        return self.chain[0].not_valid_after_utc

    def is_under(self, authorities: Sequence[x509.Certificate]) -> bool:
        """Return whether one of these authorities issued it, directly or by way of its chain."""
        at, rest = self.chain[0], list(self.chain[1:])
        while not any(_issued(at, authority) for authority in authorities):
            above = next((each for each in rest if _issued(at, each)), None)
            if above is None:
                return False
            rest.remove(above)
            at = above
        return True


def load_server_certificate(
    certificate: Path, key: Path, now: datetime | None = None
) -> ServerCertificate:
    """Return a certificate that is valid, and whose key it is.

    Args:
        certificate: The certificate, PEM; those of authorities between may follow it.
        key: Its private key, PEM, readable by its owner only, not encrypted.
        now: Present time.

    Raises:
        Refused: LF4151, LF4152 or LF4157, one of the files is missing, open to others, or cannot
            be read; LF4155, the key is encrypted; LF4163, LF4164, the certificate is none, or not
            valid now; LF4178, the key is not the certificate's.
    """
    check_certificate(certificate, None, now)
    shown = read_key_file(certificate, private=False)
    digest = hashlib.sha256(shown + read_key_file(key, private=True)).hexdigest()

    def encrypted() -> NoReturn:
        raise Refused(
            Problem("LF4155", "the key is encrypted, and nothing here can ask for its password",
                    where=str(key), remedy="decrypt it (openssl pkey -in OLD -out NEW) and keep it "
                    "mode 600")
        )  # fmt: skip

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=encrypted)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = str(getattr(error, "reason", "") or error).replace("_", " ").lower()
        raise Refused(
            Problem("LF4178", f"the key is not that of the certificate {certificate}: {why}",
                    where=str(key), remedy="put both files of one pair in place")
        ) from error  # fmt: skip
    return ServerCertificate(context, digest, tuple(x509.load_pem_x509_certificates(shown)))


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True

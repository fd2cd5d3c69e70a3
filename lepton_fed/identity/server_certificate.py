"""The coordinator's TLS certificate with its key, as they are shown to whoever connects."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from cryptography import x509

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
        hosts: Names and addresses that it is for.
        ends: When it is valid no more.
    """

    context: ssl.SSLContext
    digest: str
    hosts: tuple[str, ...]
    ends: datetime


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
    leaf = x509.load_pem_x509_certificate(shown)
    return ServerCertificate(context, digest, tuple(hosts_of(leaf)), leaf.not_valid_after_utc)

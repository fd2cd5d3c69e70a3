"""Which names share rows: keyed hashes, eight bytes a row.

A row is known by the first eight bytes of its HMAC-SHA-256 under a secret of the site. Who has the
ledger without the secret learns how many rows there are and nothing of them; who has both can tell
whether a row that they can guess is among them. Two different rows of a million share a hash with
probability 3e-8, and then something is counted twice, never too little.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.keys import read_key_file, write_key_files
from lepton_fed.privacy.ledger.chain import aside_of, give_name

__all__ = ["KnownRows", "hashes_in", "in_common", "key_name", "row_key"]

Hashes = npt.NDArray[np.uint64]

_KEY_BYTES = 32
_HASH_BYTES = 8


@dataclass(frozen=True)
class KnownRows:
    """How a site's ledger knows rows again.

    Args:
        key: File of the secret; made when rows are first hashed, for its owner only.
        read: Yields each row as the source files hold it.
    """

    key: Path
    read: Callable[[], Iterable[bytes]]

    def hashes(self, secret: bytes) -> Hashes:
        """Return the hashes of the rows, each once, ascending."""
        found = b"".join(hmac.digest(secret, row, "sha256")[:_HASH_BYTES] for row in self.read())
        return np.unique(np.frombuffer(found, "<u8"))


def row_key(path: Path, *, make: bool) -> bytes:
    """Return the secret.

    Args:
        path: Its file.
        make: Make it if it is not there.

    Raises:
        Refused: LF4152 or LF4157, others may read it, or it cannot be read or written; LF4210, it
            is gone or is none.
    """
    if make and not path.exists():
        aside = aside_of(path)
        write_key_files({aside: (secrets.token_bytes(_KEY_BYTES), 0o600)})
        give_name(aside, path)  # whole and synced: hashes of a key that is lost are worth nothing
    if not path.exists():
        raise _gone(path, "the key that rows are known again by is gone")
    content = read_key_file(path, private=True)
    if len(content) != _KEY_BYTES:
        raise _gone(path, "this is not the key that rows are known again by")
    return content


def key_name(secret: bytes) -> str:
    """Return what tells a secret from another."""
    return hashlib.sha256(b"lepton-fed ledger key 1\0" + secret).hexdigest()


def hashes_in(parts: Iterable[bytes]) -> Hashes:
    """Return hashes as they are stored: ``[rows]`` uint64, ascending."""
    whole = b"".join(parts)
    return np.unique(np.frombuffer(whole, "<u8"))


def in_common(rows: Hashes, others: Mapping[str, Hashes]) -> list[list[str]]:
    """Return which other names rows are under: the largest sets of names, each sorted.

    Args:
        rows: Hashes ``[rows]`` uint64.
        others: Those of other names.
    """
    names = sorted(others)
    under = [np.isin(rows, others[name], assume_unique=True) for name in names]
    if not names or not len(rows):
        return []
    patterns = {
        frozenset(name for name, there in zip(names, pattern, strict=True) if there)
        for pattern in np.unique(np.stack(under, axis=1), axis=0).tolist()
    }
    largest = [one for one in patterns if one and not any(one < other for other in patterns)]
    return sorted(sorted(one) for one in largest)


def _gone(path: Path, what: str) -> Refused:
    return Refused(
        Problem("LF4210", what, where=str(path),
                remedy="restore it from a backup, with the ledger that goes with it")
    )  # fmt: skip

"""What a round is: everything that a key, an envelope and a commitment of it is bound to.

A key that two sites agree on for one purpose in one round of one run, with one roster, task and
layout, is of no use for any other: each of these goes into the derivation. So does a commitment's
and an envelope's context, so that none can be moved.

References:
    H. Krawczyk and P. Eronen, "HMAC-based Extract-and-Expand Key Derivation Function (HKDF)",
    RFC 5869, 2010, section 3.2 (the info input).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lepton_fed.core.digests import canonical_json

__all__ = ["COMMITMENT_BYTES", "PROTOCOL", "Context", "commit", "derive", "opens", "wipe"]

PROTOCOL = "lepton-fed secure aggregation 1"
"""Name and version of the protocol; first in everything that is derived or signed."""

COMMITMENT_BYTES = 32

Plain = Any


@dataclass(frozen=True)
class Context:
    """An attempt at a round of secure aggregation.

    Args:
        run: Identifier of the run.
        round_number: Round, from 1.
        attempt: Attempt at the round, from 1; each has keys of its own.
        roster: Digest of the roster that the sites pinned, hexadecimal.
        task: Digest of the task.
        layout: Digest of the layout of the summed vector.
    """

    run: str
    round_number: int
    attempt: int
    roster: str
    task: str
    layout: str

    def bind(self, purpose: str, **particulars: Plain) -> bytes:
        """Return this round, a purpose and what else matters as bytes that no other case shares.

        Args:
            purpose: What is derived, for example ``"mask"``.
            particulars: Plain data, for example the two sites.
        """
        return canonical_json(
            {
                "protocol": PROTOCOL,
                "run": self.run,
                "round": self.round_number,
                "attempt": self.attempt,
                "roster": self.roster,
                "task": self.task,
                "layout": self.layout,
                "purpose": purpose,
                "particulars": particulars,
            }
        )


def derive(secret: bytes | bytearray, info: bytes, length: int) -> bytearray:
    """Return key material by HKDF with SHA-256 and no salt.

    The secrets here are uniform, or joined with one that is, so a salt would add nothing (RFC 5869,
    section 3.1).

    Args:
        secret: Input key material.
        info: What the key is for: :meth:`Context.bind`.
        length: How many bytes, up to 8160.

    Returns:
        ``length`` bytes that the caller can wipe.
    """
    made = bytearray(length)
    HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive_into(secret, made)
    return made


def wipe(*secrets: bytearray) -> None:
    """Overwrite secrets with zeros."""
    for secret in secrets:
        secret[:] = bytes(len(secret))


def commit(
    context: Context, kind: str, secret: bytes | bytearray, *, owner: str, holder: str = ""
) -> bytes:
    """Return a commitment to a secret of a round: its SHA-256 together with all of its context.

    It hides because the secret has 256 bits that nobody else knows, and binds because SHA-256 has
    no collisions that anyone can find. It needs no opening but the secret.

    Args:
        context: The round.
        kind: What the secret is, for example ``"self mask"`` or ``"share of self mask"``.
        secret: At least 32 bytes of full entropy.
        owner: Name of the site whose secret it is.
        holder: Name of the site that holds this share of it; empty for the secret itself.

    Returns:
        32 bytes.

    Raises:
        ValueError: The secret is too short to be hidden by a hash.
    """
    if len(secret) < COMMITMENT_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be committed to by its hash")
    # The context is JSON without a zero byte, so where it ends is plain.
    hasher = hashlib.sha256(
        context.bind("commitment", kind=kind, owner=owner, holder=holder) + b"\0"
    )
    hasher.update(secret)
    return hasher.digest()


def opens(
    commitment: bytes,
    context: Context,
    kind: str,
    secret: bytes | bytearray,
    *,
    owner: str,
    holder: str = "",
) -> bool:
    """Return whether a secret is the one that was committed to; the arguments are :func:`commit`'s.

    Raises:
        ValueError: The secret is too short.
    """
    made = commit(context, kind, secret, owner=owner, holder=holder)
    return hmac.compare_digest(made, commitment)

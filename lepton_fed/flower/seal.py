"""Seals: who wrote a message, to whom, and in answer to what.

TLS and Flower's node authentication say which machine is connected, not who wrote a message: Flower
files a reply under the sender that the message itself names. So the coordinator signs what it asks,
and a site signs its reply together with the nonce of the ask, which no other site has seen. A reply
counts only from the site it was asked of.

    seal = Ed25519(key, PAE(type, canonical JSON of purpose, from, to, nonce, contents))

with the SHA-256 of every array in place of its bytes (PAE: DSSE protocol 1.0.0).
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.parcels import FiledArray
from lepton_fed.identity.signature import PrivateKey, PublicKey, check_payload, sign_payload

__all__ = ["COORDINATOR", "Sealing", "contents_digest", "new_nonce", "nonce_of"]

COORDINATOR = ":coordinator"
"""The coordinator's name in a seal; no site can have it, for want of the colon."""

_TYPE = "application/vnd.lepton-fed.message.v1+json"
_SEAL = "seal"
_NONCE_BYTES = 16


@dataclass(frozen=True)
class Sealing:
    """What a seal vouches for.

    Args:
        purpose: Kind of message: ``train``, ``train reply``, ``query.offer`` ...
        author: Name of who writes it.
        reader: Name of who is meant.
        nonce: Of the ask; a reply repeats it.
    """

    purpose: str
    author: str
    reader: str
    nonce: str

    def seal(self, record: RecordDict, key: PrivateKey, contents: str = "") -> RecordDict:
        """Return the records with a seal beside them.

        Args:
            record: What is sent; its records are shared, not copied.
            key: The author's key.
            contents: :func:`contents_digest` of the record, if it is known already.
        """
        body = self._body(contents or contents_digest(record))
        signature = sign_payload(key, _TYPE, body)
        seal = ConfigRecord({"nonce": self.nonce, "signature": signature})
        return RecordDict({**record, _SEAL: seal})

    def check(self, record: RecordDict, key: PublicKey) -> RecordDict:
        """Return the records without their seal, if it vouches for them.

        Args:
            record: What came.
            key: The author's public key.

        Raises:
            UpdateRefused: LF4414, there is no seal, or it is another's, or for something else.
        """
        seal = record.get(_SEAL)
        signature = seal.get("signature") if isinstance(seal, ConfigRecord) else None
        bare = RecordDict({name: item for name, item in record.items() if name != _SEAL})
        try:
            body = self._body(contents_digest(bare))
            if isinstance(signature, bytes) and check_payload(key, _TYPE, body, signature):
                return bare
        except (TypeError, ValueError):  # text that is no Unicode, say
            pass
        what = f"a {self.purpose} message without the seal of {self.author}"
        raise UpdateRefused(Problem("LF4414", what))

    def _body(self, contents: str) -> bytes:
        return canonical_json(
            {
                "purpose": self.purpose,
                "author": self.author,
                "reader": self.reader,
                "nonce": self.nonce,
                "contents": contents,
            }
        )


def new_nonce() -> str:
    """Return 128 bits of the system's entropy, hexadecimal."""
    return secrets.token_hex(_NONCE_BYTES)


def nonce_of(record: RecordDict) -> str:
    """Return the nonce that a message claims to carry; empty without one."""
    seal = record.get(_SEAL)
    nonce = seal.get("nonce") if isinstance(seal, ConfigRecord) else None
    return nonce if isinstance(nonce, str) and len(nonce) == 2 * _NONCE_BYTES else ""


def contents_digest(record: RecordDict) -> str:
    """Return the SHA-256 of everything in the records, 64 hexadecimal digits."""
    told = {str(name): _plain(item) for name, item in record.items()}
    return hashlib.sha256(canonical_json(told)).hexdigest()


def _plain(item: ArrayRecord | ConfigRecord | MetricRecord) -> dict[str, Any]:
    if isinstance(item, ArrayRecord):
        return {
            "arrays": {
                name: [a.dtype, list(a.shape), a.stype, _hash(a)] for name, a in item.items()
            }
        }
    kind = "metrics" if isinstance(item, MetricRecord) else "config"
    return {kind: {name: _value(value) for name, value in item.items()}}


def _hash(array: Array) -> str:
    if isinstance(array, FiledArray):
        return array.sha256  # taken while it was written
    return hashlib.sha256(array.data).hexdigest()


def _value(value: Any) -> list[Any]:
    """Return a value with its type: 1, 1.0 and True are not the same, nor are bytes a text."""
    if isinstance(value, list):
        return ["list", *(_value(one) for one in value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, float):
        return ["float", value.hex()]  # also NaN and infinities, which JSON has not
    return [type(value).__name__, value]

"""The published vectors, made by the naive implementation alone.

``python -m tests.unit.privacy.secagg.published`` writes tests/vectors/secagg.json anew. The tests
compare that file with what is made here, and with the fast modules.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.privacy.secagg import naive

FILE = Path(__file__).parents[3] / "vectors" / "secagg.json"

ABOUT = [
    "Secure aggregation's primitives. Bytes are hexadecimal; words of masks, updates and sums are"
    " numbers. Random bytes of a label are SHAKE-256 of the label, read from the start.",
    "bound: canonical JSON (keys sorted, no white space, UTF-8) of a context with purpose 'mask'"
    " and particulars {'sites': [1, 2]}.",
    "commitments: SHA-256 of the context with purpose 'commitment' and particulars kind, owner and"
    " holder, a zero byte, and the secret.",
    "masks: AES of s (12 bytes, big-endian) and j + 2 (4 bytes) for block j of segment s, 8192"
    " blocks a segment; little-endian words of 4 bytes up to 32 bits, of 8 above, modulo 2**bits.",
    "packing: bit k of the byte string is bit k % bits of word k // bits, least significant first.",
    "sharing: 33 random bytes for each coefficient, highest power first, of which 257 bits count,"
    " drawn again from the prime on; share x is the polynomial at x from 1, 33 bytes, big-endian.",
    "cohorts: HKDF-SHA-256 without salt makes keys from secrets. X25519's scalar and ML-KEM-768's"
    " seed come from a pair's secret with info '<protocol> <mask|envelope> <x25519|ml-kem-768>'. An"
    " encapsulation takes its m (FIPS 203, algorithm 17) from the label"
    " 'm <smaller index> <larger index> pair secret' or 'm <sender> <recipient> envelope'.",
]

CONTEXT: dict[str, Any] = {
    "run": "run-1",
    "round_number": 7,
    "attempt": 1,
    "roster": "11" * 32,
    "task": "22" * 32,
    "layout": "33" * 32,
}
NAMES = ("söder", "alpha", "mid-2")  # neither ASCII nor sorted
STREAMS = ((32, 0, 6), (32, 32_766, 4), (32, 2_621_441, 4), (20, 3, 5), (16, 0, 3), (48, 1, 4))
UPDATES = ([1, 2, 3, 4, 5], [10, 0, 2**20 - 1, 7, 1], [2**20 - 1, 2**19, 5, 0, 0])
RING = 20


def random_bytes(label: str) -> Callable[[int], bytes]:
    """Return a source that reads SHAKE-256 of a label from the start."""
    taken = 0

    def source(count: int) -> bytes:
        nonlocal taken
        taken += count
        return hashlib.shake_256(label.encode()).digest(taken)[taken - count :]

    return source


def site(index: int, hybrid: bool) -> naive.Site:
    """Return one of the three sites."""
    source = random_bytes(f"secrets {index}")
    return naive.Site(index, NAMES[index - 1], *(source(32) for _ in range(3)), hybrid)


def cohort(hybrid: bool) -> dict[str, Any]:
    """Return keys, envelopes, masked vectors and sums of three sites."""
    sites = [site(index, hybrid) for index in (1, 2, 3)]
    pairs = []
    mask_keys = {}
    for low, high in itertools.combinations(sites, 2):
        message = random_bytes(f"m {low.index} {high.index} pair secret")(32)
        wrapped = naive.wrap(CONTEXT, low, high, message) if hybrid else b""
        key = naive.mask_key(CONTEXT, low, high, wrapped)
        mask_keys[low.index, high.index] = key
        pairs.append(
            {"sites": [low.index, high.index], "wrapped": wrapped.hex(), "mask_key": key.hex()}
        )
    masked = []
    for one, update in zip(sites, UPDATES, strict=True):
        total = [
            a + b
            for a, b in zip(
                update,
                naive.mask(naive.self_mask_key(CONTEXT, one), len(update), RING),
                strict=True,
            )
        ]
        for (low, high), key in mask_keys.items():
            sign = {low: 1, high: -1}.get(one.index, 0)
            words = naive.mask(key, len(update), RING)
            total = [a + sign * b for a, b in zip(total, words, strict=True)]
        masked.append([word % 2**RING for word in total])
    sender, recipient = sites[2], sites[0]
    content, beside = random_bytes("content")(66), b"beside"
    nonce = random_bytes("nonce")(12)
    sealed = naive.envelope(
        CONTEXT, sender, recipient, content, beside, nonce, random_bytes("m 3 1 envelope")(32)
    )
    return {
        "post_quantum": hybrid,
        "sites": [
            {
                "index": one.index,
                "name": one.name,
                **{f"{name}_secret": secret.hex() for name, secret in one.secrets.items()},
                "mask_public": one.public("mask").hex(),
                "envelope_public": one.public("envelope").hex(),
                "self_mask_key": naive.self_mask_key(CONTEXT, one).hex(),
            }
            for one in sites
        ],
        "pairs": pairs,
        "bits": RING,
        "updates": list(UPDATES),
        "masked": masked,
        "sum": [sum(words) % 2**RING for words in zip(*UPDATES, strict=True)],
        "envelope": {
            "sender": sender.index,
            "recipient": recipient.index,
            "content": content.hex(),
            "bound": beside.hex(),
            "nonce": nonce.hex(),
            "sealed": sealed.hex(),
        },
    }


def sharing(secret: bytes, shares: int, threshold: int) -> dict[str, Any]:
    """Return one secret shared out."""
    label = f"coefficients {shares} {threshold}"
    made = naive.split(secret, shares, threshold, random_bytes(label))
    return {
        "secret": secret.hex(),
        "threshold": threshold,
        "coefficients_label": label,
        "shares": [share.hex() for share in made],
    }


def vectors() -> dict[str, Any]:
    """Return all published vectors."""
    streams = []
    for (bits, start, count), width in itertools.product(STREAMS, (16, 32)):
        key = random_bytes(f"mask key {width}")(width)
        words = naive.mask(key, count, bits, start)
        streams.append({"key": key.hex(), "bits": bits, "start": start, "words": words})
    packings = []
    for bits, words in ((20, [1, 2**20 - 1, 0x54321]), (17, [2**17 - 1, 5]), (64, [2**63 + 1])):
        packed = naive.packed(words, bits).hex()
        packings.append({"bits": bits, "words": words, "packed": packed})
    secret = random_bytes("secret")(32)
    return {
        "about": ABOUT,
        "context": CONTEXT,
        "bound": naive.bound(CONTEXT, "mask", sites=[1, 2]).decode(),
        "commitments": [
            {"kind": kind, "owner": owner, "holder": holder, "secret": secret.hex()}
            | {"commitment": naive.commitment(CONTEXT, kind, secret, owner, holder).hex()}
            for kind, owner, holder in (("self mask", 1, 0), ("share of self mask", 1, 2))
        ],
        "masks": streams,
        "packing": packings,
        "prime": naive.PRIME,
        "sharing": [sharing(secret, 5, 3), sharing(b"\xff" * 32, 3, 3), sharing(secret, 2, 1)],
        "cohorts": [cohort(False), cohort(True)],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

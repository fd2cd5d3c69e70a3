"""Share envelopes: what one site tells another through a coordinator that must not read it.

An envelope is AES-256-GCM under a key of its own, one for each direction of each pair and round::

    [ML-KEM-768 ciphertext, 1088 bytes, with post-quantum keys] nonce (12) ciphertext tag (16)
    key = HKDF(X25519(sender, recipient) [|| decapsulated secret], round, direction, both sites)

The sender encapsulates to the recipient's envelope pair, in either direction, because both
envelopes of a pair travel at the same time. The round, the direction and both adverts are
associated data too, with the hash of whatever else the caller binds. The nonce is random although
the key serves for one envelope: a site that is restarted and seals again must not repeat one.

The tag shows that one of the two sites made the envelope, not which: the sender's signature over
it, which the protocol adds, does.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, section 3.4 (authenticated encryption) and figure 4, round 1.
    M. Dworkin, "Recommendation for Block Cipher Modes of Operation: Galois/Counter Mode (GCM) and
    GMAC", NIST SP 800-38D, 2007.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lepton_fed.privacy.secagg.context import Context, derive, wipe
from lepton_fed.privacy.secagg.keys import (
    KEM_CIPHERTEXT_BYTES,
    KeyPair,
    Party,
    agree,
    encapsulate,
)
from lepton_fed.privacy.secagg.shamir import Randomness

__all__ = ["envelope_bytes", "open_envelope", "seal_envelope"]

_NONCE_BYTES = 12
_TAG_BYTES = 16
_KEY_BYTES = 32


def envelope_bytes(content: int, *, post_quantum: bool) -> int:
    """Return the size of an envelope.

    Args:
        content: Size of what is in it, in bytes.
        post_quantum: Whether the sites have post-quantum keys.
    """
    head = KEM_CIPHERTEXT_BYTES if post_quantum else 0
    return head + _NONCE_BYTES + content + _TAG_BYTES


def seal_envelope(
    pair: KeyPair,
    context: Context,
    sender: Party,
    recipient: Party,
    content: bytes | bytearray,
    *,
    bound: bytes = b"",
    randomness: Randomness = secrets.token_bytes,
) -> bytes:
    """Return an envelope that only the recipient can open.

    Args:
        pair: The sender's envelope pair.
        context: The round.
        sender: Who seals.
        recipient: Who shall open it.
        content: What is in it.
        bound: What travels beside it and may not be exchanged, for example a wrapped pair secret.
        randomness: Where the nonce comes from.

    Returns:
        :func:`envelope_bytes` bytes.

    Raises:
        ValueError: The pair is not the sender's, the sites are no pair, or a public key of the
            recipient is of low order or malformed.
    """
    if pair.public != sender.envelope:
        raise ValueError(f"the key pair is not the envelope pair of {sender.name}'s advert")
    material, head = bytearray(pair.exchange(recipient.envelope)), b""
    if recipient.envelope.kem:
        shared, head = encapsulate(recipient.envelope)
        material += shared
    key, associated = _key(context, sender, recipient, material, head, bound)
    nonce = randomness(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, content, associated)
    wipe(key)
    return head + nonce + sealed


def open_envelope(
    pair: KeyPair,
    context: Context,
    sender: Party,
    recipient: Party,
    unverified: bytes,
    *,
    bound: bytes = b"",
) -> bytearray:
    """Return what is in an envelope.

    Args:
        pair: The recipient's envelope pair.
        context: The round.
        sender: Who is said to have sealed it.
        recipient: Who opens it.
        unverified: The envelope as it came.
        bound: What came beside it.

    Returns:
        The content, to be wiped by the caller.

    Raises:
        ValueError: The envelope is too short, or was not made by this sender for this recipient,
            round and ``bound``; or the pair is not the recipient's, the sites are no pair, or the
            sender's public key is of low order.
    """
    if pair.public != recipient.envelope:
        raise ValueError(f"the key pair is not the envelope pair of {recipient.name}'s advert")
    post_quantum = bool(recipient.envelope.kem)
    if len(unverified) < envelope_bytes(0, post_quantum=post_quantum):
        raise ValueError(f"the envelope of {sender.name} has only {len(unverified)} bytes")
    material, head = bytearray(pair.exchange(sender.envelope)), b""
    if post_quantum:
        head = unverified[:KEM_CIPHERTEXT_BYTES]
        material += pair.decapsulate(head)
    key, associated = _key(context, sender, recipient, material, head, bound)
    nonce_end = len(head) + _NONCE_BYTES
    cipher = AESGCM(key)
    wipe(key)
    try:
        content = cipher.decrypt(
            unverified[len(head) : nonce_end], unverified[nonce_end:], associated
        )
    except InvalidTag:
        raise ValueError(
            f"the envelope was not made by {sender.name} for {recipient.name} in this round"
        ) from None
    return bytearray(content)


def _key(
    context: Context,
    sender: Party,
    recipient: Party,
    material: bytearray,
    head: bytes,
    bound: bytes,
) -> tuple[bytearray, bytes]:
    """Return the key of an envelope and its associated data; the material is wiped."""
    info = agree(
        context,
        "envelope",
        sender,
        recipient,
        sender=sender.name,
        encapsulated=hashlib.sha256(head).hexdigest(),
        bound=hashlib.sha256(bound).hexdigest(),
    )
    key = derive(material, info, _KEY_BYTES)
    wipe(material)
    return key, info

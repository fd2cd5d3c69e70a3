"""The keys of one round: two pairs a site, one for its masks and one for its envelopes.

Each site makes three secrets of 32 bytes a round:

* ``envelope``: the pair that share envelopes are sealed with. It never leaves the site.
* ``mask``: the pair that masks are agreed with. Its secret is shared out, so that the coordinator
  can take off the masks of a site that dropped out.
* ``self_mask``: the seed of the site's own mask, shared out as well. Of one site only one of the
  two is ever revealed.

All private keys of a pair follow from its one secret. Whoever rebuilds a mask secret from shares
thus finds the very keys whose public halves the site signed in its advert, or can show that the
shares were false.

**Classical.** Both sites run X25519 and derive the key of the mask from the result.

**Post-quantum, joined to the classical.** ML-KEM-768 has no exchange: one side encapsulates to the
other, and only the owner of the decapsulation key can repeat the outcome. But the coordinator must
be able to rebuild a pair's mask from the mask secret of *either* site, because either may drop out.
So one of the two, :func:`wrapping_party`,

1. derives a pair secret from its own mask secret,
2. encapsulates to the mask pair of the other and wraps the pair secret under the outcome,
3. commits to the pair secret,

and all of this travels beside its share envelope, under its signature. Its mask secret gives the
pair secret by derivation, the other's by decapsulation; a site that wrapped another secret than the
derived one is found out by its own commitment. Mask key: HKDF over the X25519 result and the pair
secret. It stays secret while either of the two does.

Where both sites make an envelope for the other, the smaller index wraps. Where only one does, it
wraps, because the other has nothing to put a wrapped secret in. Which of the two holds, a site
knows once the envelopes have come, so in a cohort where not everybody holds shares of everybody
each envelope has a wrapped secret, and that of the larger index is left aside where both have.

The envelopes cannot carry the pair secret: rebuilding a mask secret must open no envelope, since
shares of other sites are in it. An envelope has an encapsulation of its own, from sender to
recipient, in either direction.

What cannot be wiped: secrets and derived keys are kept in bytearrays that ``wipe`` overwrites, but
what the library hands back from X25519, ML-KEM and AES-GCM are immutable objects that Python frees
without clearing; private keys and key schedules inside OpenSSL are cleared when OpenSSL sees fit;
Shamir's shares are Python integers for a moment; and pages may have been swapped out. Wiping
shortens how long a secret can be found in memory, it does not bound it.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, section 4 and figure 4 (the two key pairs, rounds 0 and 1).
    A. Langley, M. Hamburg, S. Turner, "Elliptic Curves for Security", RFC 7748, 2016, section 6.1
    (X25519, and the all-zero result that is refused).
    "Module-Lattice-Based Key-Encapsulation Mechanism Standard", NIST FIPS 203, 2024.
    R. Housley, J. Gray, T. Okubo, "Using Key Encapsulation Mechanism (KEM) Algorithms in the
    Cryptographic Message Syntax (CMS)", RFC 9629, 2024 (a key that is wrapped under a KEM's).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lepton_fed.privacy.secagg.context import (
    COMMITMENT_BYTES,
    PROTOCOL,
    Context,
    commit,
    derive,
    opens,
    wipe,
)
from lepton_fed.privacy.secagg.shamir import SECRET_BYTES, Randomness

__all__ = [
    "KeyPair",
    "Party",
    "PublicKey",
    "RoundSecrets",
    "agree",
    "encapsulate",
    "mask_key",
    "post_quantum_available",
    "self_mask_key",
    "wrap_pair_secret",
    "wrapping_party",
]

Purpose = Literal["mask", "envelope"]

X25519_BYTES = 32
KEM_PUBLIC_BYTES = 1184
KEM_CIPHERTEXT_BYTES = 1088
WRAPPED_BYTES = KEM_CIPHERTEXT_BYTES + SECRET_BYTES + 16 + COMMITMENT_BYTES  # 16 is the tag

_KEM_SEED_BYTES = 64
_SINGLE_USE_NONCE = bytes(12)
_COMMITTED = "pair secret"


def post_quantum_available() -> bool:
    """Return whether the OpenSSL that cryptography was built with can do ML-KEM-768."""
    try:
        MLKEM768PrivateKey.from_seed_bytes(bytes(_KEM_SEED_BYTES))
    except UnsupportedAlgorithm:
        return False
    return True


@dataclass(frozen=True)
class PublicKey:
    """The public half of a pair.

    Args:
        x25519: 32 bytes.
        kem: 1184 bytes of ML-KEM-768; empty without it.

    Raises:
        ValueError: A part has another length.
    """

    x25519: bytes
    kem: bytes = b""

    def __post_init__(self) -> None:
        if len(self.x25519) != X25519_BYTES or len(self.kem) not in (0, KEM_PUBLIC_BYTES):
            raise ValueError(
                f"public keys of {len(self.x25519)} and {len(self.kem)} bytes, not of "
                f"{X25519_BYTES} and 0 or {KEM_PUBLIC_BYTES}"
            )

    @classmethod
    def parse(cls, unverified: bytes) -> PublicKey:
        """Return the key that bytes of an advert stand for.

        Raises:
            ValueError: They are neither 32 nor 1216.
        """
        return cls(unverified[:X25519_BYTES], unverified[X25519_BYTES:])

    def encode(self) -> bytes:
        """Return the key as 32 or 1216 bytes."""
        return self.x25519 + self.kem

    @property
    def digest(self) -> str:
        """Return SHA-256 of the encoding, 64 hexadecimal digits."""
        return hashlib.sha256(self.encode()).hexdigest()


@dataclass(frozen=True)
class Party:
    """A site of the cohort as the others know it from its signed advert.

    Args:
        index: Its place in the cohort, from 1: the point of its shares, and the order of a pair.
        name: Its name on the roster.
        mask: Public half of its mask pair.
        envelope: Public half of its envelope pair.

    Raises:
        ValueError: The index is below 1.
    """

    index: int
    name: str
    mask: PublicKey
    envelope: PublicKey

    def __post_init__(self) -> None:
        if self.index < 1:
            raise ValueError(f"a site of index {self.index}")


class KeyPair:
    """X25519, and ML-KEM-768 where asked for, both made from one secret.

    Args:
        secret: 32 secret bytes.
        purpose: Which of the two pairs it is; the same secret gives other keys for the other.
        post_quantum: Whether there is an ML-KEM-768 half.

    Raises:
        ValueError: The secret has another length.
        UnsupportedAlgorithm: There is no ML-KEM-768 here; :func:`post_quantum_available` says so.
    """

    def __init__(self, secret: bytes | bytearray, purpose: Purpose, *, post_quantum: bool) -> None:
        _check_secret(secret)
        self.purpose = purpose
        scalar = derive(secret, _own(purpose, "x25519"), X25519_BYTES)
        self._x25519: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(scalar)
        wipe(scalar)
        self._kem: MLKEM768PrivateKey | None = None
        if post_quantum:
            self._kem = MLKEM768PrivateKey.from_seed_bytes(
                derive(secret, _own(purpose, "ml-kem-768"), _KEM_SEED_BYTES)
            )
        self._secret = bytearray(secret)
        self.public = PublicKey(
            self._x25519.public_key().public_bytes_raw(),
            self._kem.public_key().public_bytes_raw() if self._kem else b"",
        )

    def __repr__(self) -> str:
        return f"KeyPair({self.purpose}, {self.public.digest[:8]})"

    @property
    def secret(self) -> bytearray:
        """Return the secret itself, not a copy.

        Raises:
            ValueError: The pair was wiped.
        """
        if self._x25519 is None:
            raise ValueError("the keys of this round were wiped")
        return self._secret

    def exchange(self, other: PublicKey) -> bytes:
        """Return the X25519 result with another's public key, 32 bytes.

        Raises:
            ValueError: The other key is of low order, so that the result would be zero whatever our
                secret; or the pair was wiped.
        """
        if self._x25519 is None:
            raise ValueError("the keys of this round were wiped")
        try:
            shared = self._x25519.exchange(X25519PublicKey.from_public_bytes(other.x25519))
        except ValueError:  # how OpenSSL reports a result of zero
            shared = bytes(X25519_BYTES)
        if shared == bytes(X25519_BYTES):
            raise ValueError("the public key is a point of low order")
        return shared

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Return the secret of an ML-KEM-768 ciphertext, 32 bytes.

        A ciphertext made for another key gives another secret, and no error (FIPS 203, section
        6.3).

        Raises:
            ValueError: It has another length, or the pair has no ML-KEM-768 half or was wiped.
        """
        if self._kem is None:
            raise ValueError("no post-quantum key, or the keys of this round were wiped")
        return self._kem.decapsulate(ciphertext)

    def wipe(self) -> None:
        """Overwrite the secret and let go of the private keys."""
        wipe(self._secret)
        self._x25519 = None
        self._kem = None


class RoundSecrets:
    """All that a site must keep to itself in one round.

    Args:
        envelope: 32 secret bytes.
        mask: 32 secret bytes.
        self_mask: 32 secret bytes.
        post_quantum: Whether the pairs have ML-KEM-768 halves.

    Raises:
        ValueError: A secret has another length.
        UnsupportedAlgorithm: There is no ML-KEM-768 here.
    """

    def __init__(
        self,
        envelope: bytes | bytearray,
        mask: bytes | bytearray,
        self_mask: bytes | bytearray,
        *,
        post_quantum: bool,
    ) -> None:
        _check_secret(self_mask)
        self.envelope = KeyPair(envelope, "envelope", post_quantum=post_quantum)
        self.mask = KeyPair(mask, "mask", post_quantum=post_quantum)
        self.self_mask = bytearray(self_mask)

    @classmethod
    def generate(
        cls, *, post_quantum: bool, randomness: Randomness = secrets.token_bytes
    ) -> RoundSecrets:
        """Draw the secrets of a round: envelope, mask, self mask, in this order.

        Args:
            post_quantum: Whether the pairs have ML-KEM-768 halves.
            randomness: Where they come from.
        """
        drawn = [randomness(SECRET_BYTES) for _ in range(3)]
        return cls(*drawn, post_quantum=post_quantum)

    def party(self, index: int, name: str) -> Party:
        """Return this site as the others shall know it.

        Args:
            index: Its place in the cohort, from 1.
            name: Its name on the roster.
        """
        return Party(index, name, self.mask.public, self.envelope.public)

    def wipe(self) -> None:
        """Overwrite all three secrets; the module says what stays behind."""
        self.envelope.wipe()
        self.mask.wipe()
        wipe(self.self_mask)


def agree(context: Context, purpose: str, first: Party, second: Party, **more: Any) -> bytes:
    """Return what a key of two sites is bound to: the round, the purpose, both sites and keys.

    Args:
        context: The round.
        purpose: What the key is for.
        first: One site.
        second: The other; which is which makes no difference.
        more: What else the key is bound to.

    Raises:
        ValueError: They have the same index or name, or only one has post-quantum keys.
    """
    if first.index == second.index or first.name == second.name:
        raise ValueError(f"no pair: {first.name} ({first.index}), {second.name} ({second.index})")
    kinds = {len(p.kem) for p in (first.mask, first.envelope, second.mask, second.envelope)}
    if len(kinds) > 1:
        raise ValueError(f"only some keys of {first.name} and {second.name} are post-quantum")
    sites = [
        {"index": p.index, "name": p.name, "mask": p.mask.digest, "envelope": p.envelope.digest}
        for p in sorted((first, second), key=lambda p: p.index)
    ]
    return context.bind(purpose, sites=sites, **more)


def encapsulate(key: PublicKey) -> tuple[bytes, bytes]:
    """Return a fresh secret, 32 bytes, and its ML-KEM-768 ciphertext, 1088 bytes.

    Args:
        key: Whose ML-KEM-768 half can decapsulate it.

    Raises:
        ValueError: The key has no such half, or it is malformed (FIPS 203, section 7.2).
    """
    return MLKEM768PublicKey.from_public_bytes(key.kem).encapsulate()


def wrapping_party(one: Party, two: Party, makers: Collection[str]) -> Party:
    """Return which site of a pair has wrapped the pair secret.

    Args:
        one: A site.
        two: Another one.
        makers: Names of the one or two of them that made an envelope for the other.

    Raises:
        ValueError: Neither did.
    """
    wrapping = [party for party in (one, two) if party.name in makers]
    if not wrapping:
        raise ValueError(f"{one.name} and {two.name} hold no shares of each other")
    return min(wrapping, key=lambda party: party.index)


def wrap_pair_secret(pair: KeyPair, context: Context, own: Party, other: Party) -> bytes:
    """Return the pair secret of two sites, wrapped by one for the other alone.

    The operating system's randomness goes into the encapsulation, so two calls differ; only one of
    them may be sent in a round.

    Args:
        pair: Mask pair of the site that wraps.
        context: The round.
        own: That site.
        other: The other one.

    Returns:
        Ciphertext, wrapped secret and commitment, 1168 bytes; nothing without post-quantum keys.

    Raises:
        ValueError: The sites are no pair, the key pair is not ``own``'s, or the other's key is no
            ML-KEM-768 key.
    """
    _check_owner(pair, own)
    info = agree(context, "wrapped pair secret", own, other)
    if not own.mask.kem:
        return b""
    key, ciphertext = encapsulate(other.mask)
    wrapping = AESGCM(derive(key, info, SECRET_BYTES))
    secret = _pair_secret(pair, context, own, other)
    # The key comes from a fresh encapsulation and is used once, so the nonce may be fixed.
    sealed = wrapping.encrypt(_SINGLE_USE_NONCE, secret, info + ciphertext)
    committed = commit(context, _COMMITTED, secret, owner=own.name, holder=other.name)
    wipe(secret)
    return ciphertext + sealed + committed


def mask_key(
    pair: KeyPair,
    context: Context,
    own: Party,
    other: Party,
    wrapped: bytes,
    *,
    wrapper: Party | None = None,
) -> bytearray:
    """Return the key of the mask that two sites share.

    The coordinator calls it with a mask pair that it rebuilt from shares, the sites with their own.

    Args:
        pair: Mask pair of one of the two sites.
        context: The round.
        own: The site whose pair it is.
        other: The other one.
        wrapped: What one of them made with :func:`wrap_pair_secret`; empty without post-quantum
            keys.
        wrapper: Which of the two made it; the smaller index where both could.

    Returns:
        16 bytes, 32 with post-quantum keys, to be wiped by the caller.

    Raises:
        ValueError: The pair is not the one of ``own``'s advert, a public key is of low order, or
            the wrapped secret has another length, was not made for this pair and round, or is not
            the one that the site that wrapped it derives and committed to.
    """
    _check_owner(pair, own)
    material = bytearray(pair.exchange(other.mask))
    length = 16
    if own.mask.kem or wrapped:
        if len(wrapped) != WRAPPED_BYTES:
            raise ValueError(f"a wrapped pair secret has {len(wrapped)} bytes, not {WRAPPED_BYTES}")
        length = 32
        wrapper = wrapper or wrapping_party(own, other, (own.name, other.name))
        holder = other if wrapper.name == own.name else own
        if holder is other:
            secret = _pair_secret(pair, context, own, other)
        else:
            secret = _unwrap(pair, context, own, other, wrapped[:-COMMITMENT_BYTES])
        if not opens(
            wrapped[-COMMITMENT_BYTES:],
            context,
            _COMMITTED,
            secret,
            owner=wrapper.name,
            holder=holder.name,
        ):
            raise ValueError(f"{wrapper.name} committed to another pair secret with {holder.name}")
        material += secret
        wipe(secret)
    made = hashlib.sha256(wrapped).hexdigest()
    key = derive(material, agree(context, "mask", own, other, wrapped=made), length)
    wipe(material)
    return key


def self_mask_key(seed: bytes | bytearray, context: Context, owner: Party) -> bytearray:
    """Return the key of a site's own mask.

    Args:
        seed: The site's ``self_mask`` secret, 32 bytes.
        context: The round.
        owner: The site.

    Returns:
        16 bytes, 32 with post-quantum keys, to be wiped by the caller.

    Raises:
        ValueError: The seed has another length.
    """
    _check_secret(seed)
    info = context.bind("self mask", index=owner.index, name=owner.name)
    return derive(seed, info, 32 if owner.mask.kem else 16)


def _pair_secret(pair: KeyPair, context: Context, own: Party, other: Party) -> bytearray:
    return derive(pair.secret, agree(context, "pair secret", own, other), SECRET_BYTES)


def _unwrap(pair: KeyPair, context: Context, own: Party, other: Party, wrapped: bytes) -> bytearray:
    info = agree(context, "wrapped pair secret", own, other)
    ciphertext = wrapped[:KEM_CIPHERTEXT_BYTES]
    wrapping = AESGCM(derive(pair.decapsulate(ciphertext), info, SECRET_BYTES))
    try:
        return bytearray(
            wrapping.decrypt(_SINGLE_USE_NONCE, wrapped[KEM_CIPHERTEXT_BYTES:], info + ciphertext)
        )
    except InvalidTag:
        raise ValueError(
            f"the pair secret of {other.name} was not wrapped for {own.name} in this round"
        ) from None


def _own(purpose: Purpose, algorithm: str) -> bytes:
    return f"{PROTOCOL} {purpose} {algorithm}".encode()


def _check_secret(secret: bytes | bytearray) -> None:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")


def _check_owner(pair: KeyPair, own: Party) -> None:
    if pair.public != own.mask:
        raise ValueError(f"the key pair is not the mask pair of {own.name}'s advert")

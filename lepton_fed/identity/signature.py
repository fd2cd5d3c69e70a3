"""Signatures: Ed25519 over DSSE's pre-authentication encoding.

What is signed, a bundle's manifest, a roster, a message, is never the payload alone but

    PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body

with LEN in decimal bytes, so that a signature given for one kind of payload is worth nothing for
another, and no two pairs of type and body share an encoding.

The types keep apart what mypy can keep apart: the parsers of this room take
:data:`VerifiedBytes`, and only :func:`verify` and a comparison with a verified hash make them.

References:
    DSSE protocol 1.0.0, secure-systems-lab/dsse, protocol.md, 2021.
    S. Josefsson and I. Liusvaara, "Edwards-Curve Digital Signature Algorithm (EdDSA)", RFC 8032,
    2017.
"""

from __future__ import annotations

import hashlib
from typing import NewType, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lepton_fed.errors import BundleRefused, Problem

__all__ = [
    "MANIFEST_TYPE",
    "SIGNATURE_BYTES",
    "PrivateKey",
    "PublicKey",
    "VerifiedBytes",
    "check_payload",
    "fingerprint",
    "pre_authentication_encoding",
    "sign",
    "sign_payload",
    "verify",
]

PrivateKey: TypeAlias = Ed25519PrivateKey
PublicKey: TypeAlias = Ed25519PublicKey
VerifiedBytes = NewType("VerifiedBytes", bytes)

MANIFEST_TYPE = "application/vnd.lepton-fed.manifest.v1+json"
SIGNATURE_BYTES = 64

_GROUP = 4


def pre_authentication_encoding(payload_type: str, body: bytes) -> bytes:
    """Return the bytes that DSSE signs for a payload.

    Args:
        payload_type: What the payload is.
        body: The payload.

    Example:
        >>> pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def sign_payload(private: PrivateKey, payload_type: str, body: bytes) -> bytes:
    """Return the signature of a payload of any type.

    Ed25519 draws no randomness: the same key and payload always give the same signature.

    Args:
        private: The signer's key.
        payload_type: What the payload is.
        body: The payload.

    Returns:
        64 bytes.
    """
    return private.sign(pre_authentication_encoding(payload_type, body))


def check_payload(
    public: PublicKey, payload_type: str, unverified_body: bytes, signature: bytes
) -> bool:
    """Return whether the holder of the private key signed this payload as one of this type.

    Args:
        public: The signer's key.
        payload_type: What the payload is.
        unverified_body: Bytes that claim to be it.
        signature: Bytes that claim to be its signature, of any length.
    """
    try:
        public.verify(signature, pre_authentication_encoding(payload_type, unverified_body))
    except InvalidSignature:
        return False
    return True


def sign(private: PrivateKey, payload: bytes) -> bytes:
    """Return the signature of a manifest.

    Ed25519 draws no randomness: the same key and payload always give the same signature.

    Args:
        private: The coordinator's key.
        payload: Bytes of the manifest.

    Returns:
        64 bytes.
    """
    return sign_payload(private, MANIFEST_TYPE, payload)


def verify(
    public: PublicKey, unverified_payload: bytes, signature: bytes, *, where: str = ""
) -> VerifiedBytes:
    """Return ``unverified_payload`` if the holder of the private key signed it as a manifest.

    Args:
        public: The pinned key.
        unverified_payload: Bytes that claim to be a manifest.
        signature: 64 bytes.
        where: Where the payload was found, for the message.

    Raises:
        BundleRefused: LF4104, the signature does not fit payload and key.
    """
    if not check_payload(public, MANIFEST_TYPE, unverified_payload, signature):
        raise BundleRefused(
            Problem(
                code="LF4104",
                what="the signature is not one that the pinned key "
                f"({fingerprint(public)}) made for this manifest",
                where=where,
                remedy="compare the key's fingerprint with the coordinator's by another way; if it "
                "is the right key, the bundle was changed: fetch it again and tell the coordinator",
            )
        )
    return VerifiedBytes(unverified_payload)


def fingerprint(public: PublicKey) -> str:
    """Return the name that people compare a key by.

    Args:
        public: The key.

    Returns:
        SHA-256 of the 32 raw bytes of the key: 64 hexadecimal digits in 16 groups of four.
    """
    digits = hashlib.sha256(public.public_bytes_raw()).hexdigest()
    return " ".join(digits[i : i + _GROUP] for i in range(0, len(digits), _GROUP))

"""Fingerprints as words that two people can compare by phone.

Sixteen bits make a word of five letters, consonants and vowels in turn, which can be said and heard
without spelling: four bits a consonant, two a vowel.

References:
    D. S. Wilkerson, "A Proposal for Proquints: Identifiers that are Readable, Spellable, and
    Pronounceable", 2009, arXiv:0901.4016.
"""

from __future__ import annotations

import hashlib

from lepton_fed.identity.signature import PublicKey

__all__ = ["key_words", "words"]

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aiou"
_KEY_BYTES = 16


def words(data: bytes) -> str:
    """Return an even number of bytes as words.

    Args:
        data: Two bytes a word.

    Raises:
        ValueError: The number of bytes is odd.

    Example:
        >>> words(bytes([127, 0, 0, 1]))
        'lusab babad'
    """
    if len(data) % 2:
        raise ValueError("a word takes two bytes")
    return " ".join(_word(data[i] << 8 | data[i + 1]) for i in range(0, len(data), 2))


def _word(bits: int) -> str:
    return "".join(
        (
            _CONSONANTS[bits >> 12],
            _VOWELS[bits >> 10 & 3],
            _CONSONANTS[bits >> 6 & 15],
            _VOWELS[bits >> 4 & 3],
            _CONSONANTS[bits & 15],
        )
    )


def key_words(public: PublicKey) -> str:
    """Return the eight words of a key: the first 128 bits of the SHA-256 of its 32 raw bytes."""
    return words(hashlib.sha256(public.public_bytes_raw()).digest()[:_KEY_BYTES])

"""Mask streams: ring words that nobody without the key can tell from uniform ones.

A mask is a keystream of AES in counter mode, read as little-endian words of the ring. Two sites of
a pair hold the same key; the one with the smaller index adds the mask, the other subtracts it, so
that it cancels in their sum::

    y_u = x_u + stream(b_u) + sum(v > u) stream(k_uv) - sum(v < u) stream(k_uv)   mod 2**bits

A ring of ``bits`` bits lives in 32-bit words up to 32 bits and in 64-bit words above. The words
are computed modulo ``2**32`` or ``2**64`` and cut to ``bits`` bits at the end: a power of two
divides the other, so a cut uniform word is uniform.

The counter follows from the place in the vector: block ``j`` of 16 bytes within segment ``s`` of
128 KiB is the encryption of ``s`` in 12 bytes and ``j + 2`` in 4, both big-endian. Any slice of a
mask can therefore be made alone: on another core, in a stream, or again after a restart. A segment
stays in the second-level cache while all masks are applied to it, hence the cost is that of AES and
one addition and not of memory; both release Python's global lock.

These counters are AES-GCM's for the nonce ``s``, so the segment is what AES-GCM makes of zeros, its
tag thrown away. That is the fastest way to counter mode that OpenSSL has: on processors with VAES
its GCM is twice as fast as its plain counter mode, which encrypts without wide registers.

A key serves for one stream only: two streams from one key would be the same mask.

References:
    K. Bonawitz, V. Ivanov, B. Kreuter, A. Marcedone, H. B. McMahan, S. Patel, D. Ramage, A. Segal,
    K. Seth, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
    section 4 (masking with one-time pads, double masking) and section 3.3 (the generator).
    M. Dworkin, "Recommendation for Block Cipher Modes of Operation", NIST SP 800-38A, 2001,
    section 6.5 (counter mode: every block of a key is counted differently).
    M. Dworkin, "Recommendation for Block Cipher Modes of Operation: Galois/Counter Mode (GCM) and
    GMAC", NIST SP 800-38D, 2007, sections 6.5 and 7.1 (its counters).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = [
    "MASK_KEY_BYTES",
    "SEGMENT_BYTES",
    "Words",
    "apply",
    "cores",
    "pair_sign",
    "stream",
    "words_dtype",
]

Words: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
Key: TypeAlias = bytes | bytearray

MASK_KEY_BYTES = (16, 32)
"""Lengths of a mask's key: AES-128, and AES-256 where masks must outlast a quantum computer."""

SEGMENT_BYTES = 1 << 17
"""What one nonce serves for: 32 768 words of 32 bits. Slices from border to border cost least."""

_TASK_SEGMENTS = 32  # long enough that handing out a task costs nothing beside it
_NONCE_BYTES = 12
_TAG_BYTES = 16


def words_dtype(bits: int) -> np.dtype[np.uint32] | np.dtype[np.uint64]:
    """Return the type of the words of a ring.

    Args:
        bits: Size of the ring in bits, 16 to 64.

    Raises:
        ValueError: The size is out of range.
    """
    if not 16 <= bits <= 64:
        raise ValueError(f"a ring of {bits} bits is not between 16 and 64")
    return np.dtype(np.uint32) if bits <= 32 else np.dtype(np.uint64)


def pair_sign(site: int, neighbour: int) -> int:
    """Return 1 where a site adds the mask that it shares with a neighbour, -1 where it subtracts.

    Args:
        site: Index of the site in the cohort.
        neighbour: Index of the other.

    Raises:
        ValueError: They are the same.
    """
    if site == neighbour:
        raise ValueError(f"site {site} has no mask with itself")
    return 1 if site < neighbour else -1


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every operating system
        return os.cpu_count() or 1


def stream(key: Key, count: int, *, bits: int = 32, start: int = 0) -> Words:
    """Return a slice of a mask.

    Args:
        key: 16 or 32 secret bytes.
        count: Length of the slice, in words.
        bits: Size of the ring in bits, 16 to 64.
        start: Place of the slice in the whole mask, in words.

    Returns:
        ``[count]`` words below ``2**bits``.

    Raises:
        ValueError: A length, a place or the size of the ring is out of range.
    """
    if count < 0:
        raise ValueError(f"a slice of {count} words")
    words: Words = np.zeros(count, dtype=words_dtype(bits))
    apply(words, plus=[key], bits=bits, start=start, workers=1)
    return words


def apply(
    words: Words,
    *,
    plus: Sequence[Key] = (),
    minus: Sequence[Key] = (),
    bits: int = 32,
    start: int = 0,
    workers: int | None = None,
) -> None:
    """Add some masks to a slice of a ring vector and take others off, in one pass over it.

    Args:
        words: ``[n]`` uint32 up to 32 bits, uint64 above, contiguous and writable; changed in
            place to words below ``2**bits``.
        plus: Keys of the masks that are added, 16 or 32 bytes each.
        minus: Keys of the masks that are subtracted.
        bits: Size of the ring in bits, 16 to 64.
        start: Place of the slice in the whole vector, in words.
        workers: Threads; None takes one for each core.

    Raises:
        ValueError: The words have another type or shape, a key another length, or the place or
            the number of threads is out of range. Nothing is changed then.
    """
    _check(words, (*plus, *minus), bits, start)
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"{workers} threads")
    parts = list(_parts(start * words.itemsize, words.nbytes, workers))
    if workers == 1 or len(parts) <= 1:
        for part in parts:
            _apply_to_part(words, part, plus, minus, bits, start)
        return
    with ThreadPoolExecutor(min(workers, len(parts))) as pool:
        done = [
            pool.submit(_apply_to_part, words, part, plus, minus, bits, start) for part in parts
        ]
        for future in done:
            future.result()


def _check(words: Words, keys: Sequence[Key], bits: int, start: int) -> None:
    dtype = words_dtype(bits)
    if words.dtype != dtype or words.ndim != 1:
        raise ValueError(
            f"a ring of {bits} bits takes a vector of {dtype}, not {words.dtype} of {words.ndim} "
            "dimensions"
        )
    if not (words.flags.c_contiguous and words.flags.writeable):
        raise ValueError("the words are not contiguous and writable")
    if start < 0:
        raise ValueError(f"a slice from word {start}")
    for key in keys:
        if len(key) not in MASK_KEY_BYTES:
            raise ValueError(f"a mask's key has {len(key)} bytes, not 16 or 32")


def _parts(place: int, size_bytes: int, workers: int) -> Iterator[range]:
    """Yield the segments of each task, numbered in the whole vector.

    Args:
        place: Where the slice begins, in bytes.
        size_bytes: Its length.
        workers: How many threads shall have something to do.
    """
    if size_bytes == 0:
        return
    first, last = place // SEGMENT_BYTES, (place + size_bytes - 1) // SEGMENT_BYTES
    step = min(_TASK_SEGMENTS, -(-(last + 1 - first) // workers))
    for low in range(first, last + 1, step):
        yield range(low, min(low + step, last + 1))


def _apply_to_part(
    words: Words,
    part: range,
    plus: Sequence[Key],
    minus: Sequence[Key],
    bits: int,
    start: int,
) -> None:
    width = words.itemsize
    begin, end = start * width, start * width + words.nbytes
    little = words.dtype.newbyteorder("<")
    zeros = memoryview(bytes(SEGMENT_BYTES))
    keystream = bytearray(SEGMENT_BYTES + _TAG_BYTES)
    adding, subtracting = [AESGCM(key) for key in plus], [AESGCM(key) for key in minus]
    for segment in part:
        place = segment * SEGMENT_BYTES
        low, high = max(begin, place), min(end, place + SEGMENT_BYTES)
        block = words[(low - begin) // width : (high - begin) // width]
        source = zeros[: high - place]
        target = memoryview(keystream)[: high - place + _TAG_BYTES]
        mask = np.frombuffer(target[low - place : high - place], dtype=little)
        nonce = segment.to_bytes(_NONCE_BYTES, "big")
        for cipher in adding:
            cipher.encrypt_into(nonce, source, None, target)
            np.add(block, mask, out=block)
        for cipher in subtracting:
            cipher.encrypt_into(nonce, source, None, target)
            np.subtract(block, mask, out=block)
        if bits < 8 * width:
            np.bitwise_and(block, block.dtype.type((1 << bits) - 1), out=block)
    keystream[:] = bytes(len(keystream))

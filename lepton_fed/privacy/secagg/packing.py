"""Ring words on the wire: as many bits each as the ring has, nothing between and nothing after.

Word ``i`` of a ring of ``b`` bits is bits ``i * b`` to ``(i + 1) * b - 1`` of the byte string, the
least significant bit first both within the word and within each byte. A 20-bit ring takes 2.5
bytes a word. The bits that fill up the last byte are zero, so a vector has exactly one encoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lepton_fed.core.exchange import Octets
from lepton_fed.privacy.secagg.masks import Words, words_dtype

__all__ = ["pack", "packed_bytes", "packed_words", "unpack", "unpacked"]

_UNIT_BITS = 64
_BLOCK_WORDS = 1 << 16  # a multiple of every group; its temporaries stay in cache


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes words take on the wire.

    Args:
        count: How many words.
        bits: Size of the ring in bits, 16 to 64.

    Raises:
        ValueError: The count is negative or the ring out of range.

    Example:
        >>> packed_bytes(10_000_000, 20)
        25000000
    """
    words_dtype(bits)
    if count < 0:
        raise ValueError(f"{count} words")
    return -(-count * bits // 8)


def pack(words: Words, bits: int) -> bytes:
    """Return words as bytes of the wire.

    Args:
        words: ``[n]`` uint32 up to 32 bits, uint64 above, each below ``2**bits``.
        bits: Size of the ring in bits, 16 to 64.

    Returns:
        :func:`packed_bytes` bytes.

    Raises:
        ValueError: The words have another type or shape, or one has more bits than the ring.

    Example:
        >>> pack(np.array([0x54321, 0x98765], dtype=np.uint32), 20).hex()
        '2143557698'
    """
    dtype = words_dtype(bits)
    if words.dtype != dtype or words.ndim != 1:
        raise ValueError(f"a ring of {bits} bits takes a vector of {dtype}, not {words.dtype}")
    if words.size and int(words.max()) >> bits:
        raise ValueError(f"a word has more than {bits} bits")
    if bits == 8 * dtype.itemsize:
        return words.astype(dtype.newbyteorder("<"), copy=False).tobytes()
    group, units = _group(bits)
    packed = np.zeros((-(-words.size // group), units), dtype="<u8")
    for first in range(0, words.size, _BLOCK_WORDS):
        rows = _whole_groups(words[first : first + _BLOCK_WORDS], group).astype(np.uint64)
        target = packed[first // group : first // group + len(rows)]
        for place, unit, shift in _pieces(group, bits):
            target[:, unit] |= _moved(rows[:, place], -shift)
    return packed.tobytes()[: packed_bytes(words.size, bits)]


def packed_words(words: Words, bits: int) -> npt.NDArray[np.uint8]:
    """Return words as bytes of the wire, those of whole 32 or 64 bits without a copy.

    Args:
        words: As :func:`pack` takes them.
        bits: Size of the ring in bits, 16 to 64.

    Returns:
        ``[packed_bytes(n, bits)]`` uint8.

    Raises:
        ValueError: As :func:`pack`.
    """
    dtype = words_dtype(bits)
    if bits == 8 * dtype.itemsize and words.dtype == dtype and words.ndim == 1:
        whole = np.ascontiguousarray(words, dtype.newbyteorder("<"))
        return whole.view(np.uint8)
    return np.frombuffer(pack(words, bits), dtype=np.uint8)


def unpack(packed: bytes | bytearray | memoryview, count: int, bits: int) -> Words:
    """Return the words that bytes of the wire stand for.

    Args:
        packed: :func:`packed_bytes` bytes.
        count: How many words there are.
        bits: Size of the ring in bits, 16 to 64.

    Returns:
        ``[count]`` uint32 up to 32 bits, uint64 above, each below ``2**bits``.

    Raises:
        ValueError: The bytes are too few or too many, or the last byte is not filled up with zeros.
    """
    blocks = unpacked(np.frombuffer(packed, dtype=np.uint8), count, bits)
    words: Words = np.empty(count, dtype=words_dtype(bits))
    for part, found in blocks:
        words[part] = found
    return words


def unpacked(packed: Octets, count: int, bits: int) -> Iterator[tuple[slice, Words]]:
    """Return the words that bytes of the wire stand for, block by block.

    All is checked before the first block is there.

    Args:
        packed: :func:`packed_bytes` bytes.
        count: How many words there are.
        bits: Size of the ring in bits, 16 to 64.

    Returns:
        Where each block belongs, and its words as :func:`unpack` returns them.

    Raises:
        ValueError: The bytes are too few or too many, or the last byte is not filled up with zeros.
    """
    expected = packed_bytes(count, bits)
    if packed.size != expected:
        raise ValueError(f"{count} words of {bits} bits take {expected} bytes, not {packed.size}")
    used = count * bits % 8
    if used and packed[expected - 1 : expected][0] >> used:
        raise ValueError("the last byte is not filled up with zeros")
    return _blocks(packed, count, bits)


def _blocks(packed: Octets, count: int, bits: int) -> Iterator[tuple[slice, Words]]:
    dtype = words_dtype(bits)
    group, units = _group(bits)
    for first in range(0, count, _BLOCK_WORDS):
        part = slice(first, min(first + _BLOCK_WORDS, count))
        begin = first * bits // 8
        raw = packed[begin : begin + packed_bytes(part.stop - first, bits)]
        if bits == 8 * dtype.itemsize:
            words: Words = raw.view(dtype.newbyteorder("<"))
            yield part, words
            continue
        packed_rows = _whole_groups(raw, 8 * units).view("<u8")
        found = np.zeros((len(packed_rows), group), dtype=np.uint64)
        for place, unit, shift in _pieces(group, bits):
            found[:, place] |= _moved(packed_rows[:, unit], shift)
        found &= np.uint64((1 << bits) - 1)
        ring: Words = np.empty(part.stop - first, dtype=dtype)
        ring[:] = found.reshape(-1)[: ring.size]
        yield part, ring


def _group(bits: int) -> tuple[int, int]:
    """Return how many words fill how many 64-bit units exactly."""
    common = math.gcd(bits, _UNIT_BITS)
    return _UNIT_BITS // common, bits // common


def _pieces(group: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield word, unit, and by how many bits the unit's content stands higher in the word."""
    for place in range(group):
        low = place * bits
        for unit in range(low // _UNIT_BITS, (low + bits - 1) // _UNIT_BITS + 1):
            yield place, unit, _UNIT_BITS * unit - low


def _moved(column: npt.NDArray[np.uint64], up: int) -> npt.NDArray[np.uint64]:
    return column << np.uint64(up) if up >= 0 else column >> np.uint64(-up)


Scalar = TypeVar("Scalar", bound=np.generic)


def _whole_groups(flat: npt.NDArray[Scalar], width: int) -> npt.NDArray[Scalar]:
    """Return ``[ceil(n / width), width]``, the last row filled up with zeros."""
    missing = -flat.size % width
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, dtype=flat.dtype)])
    return flat.reshape(-1, width)

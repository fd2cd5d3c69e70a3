"""Packing: exact for any length and ring, and one encoding for each vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lepton_fed.privacy.secagg import masks, packing
from tests.unit.privacy.secagg import naive


@st.composite
def vectors(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(16, 64))
    word = st.one_of(st.integers(0, 2**bits - 1), st.sampled_from([0, 1, 2**bits - 1]))
    return bits, draw(st.lists(word, max_size=70))


@given(vectors())
@example((20, []))
@example((64, [2**64 - 1]))
@settings(max_examples=200, deadline=None)
def test_words_come_back_and_the_bytes_are_those_of_one_big_number(
    vector: tuple[int, list[int]],
) -> None:
    bits, values = vector
    words = np.array(values, dtype=masks.words_dtype(bits))
    packed = packing.pack(words, bits)
    assert packed == naive.packed(values, bits)
    assert len(packed) == packing.packed_bytes(len(values), bits)
    again = packing.unpack(packed, len(values), bits)
    assert again.dtype == words.dtype
    assert again.tolist() == values


@pytest.mark.parametrize("bits", [16, 17, 20, 31, 32, 33, 64])
@pytest.mark.parametrize("more", [-1, 0, 1, 3])
def test_words_come_back_across_blocks(bits: int, more: int) -> None:
    words = masks.stream(bytes(16), 2 * packing._BLOCK_WORDS + more, bits=bits)
    packed = packing.pack(words, bits)
    assert (packing.unpack(packed, words.size, bits) == words).all()
    # A slice that starts on the border of a byte is packed alone as it is within the whole.
    half = packing._BLOCK_WORDS
    assert packing.pack(words[half:], bits) == packed[half * bits // 8 :]


def test_twenty_bits_take_two_and_a_half_bytes() -> None:
    assert packing.packed_bytes(10_000_000, 20) == 25_000_000
    assert packing.packed_bytes(3, 20) == 8


def test_a_view_with_gaps_and_any_buffer_will_do() -> None:
    words = np.arange(20, dtype=np.uint32)
    packed = packing.pack(words[::2], 20)
    for buffer in (packed, bytearray(packed), memoryview(packed)):
        assert packing.unpack(buffer, 10, 20).tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize("length", [0, 4, 6])
def test_another_number_of_bytes_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"2 words of 20 bits take 5 bytes, not {length}"):
        packing.unpack(bytes(length), 2, 20)


@pytest.mark.parametrize("bit", range(4, 8))
def test_bits_after_the_last_word_are_refused(bit: int) -> None:
    packed = bytearray(packing.pack(np.array([5], dtype=np.uint32), 20))
    packed[-1] |= 1 << bit
    with pytest.raises(ValueError, match="not filled up with zeros"):
        packing.unpack(packed, 1, 20)


def test_a_word_with_too_many_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 20 bits"):
        packing.pack(np.array([0, 2**20], dtype=np.uint32), 20)


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        (np.zeros(2, np.uint64), 20),
        (np.zeros(2, np.uint32), 40),
        (np.zeros(2, np.int32), 20),
        (np.zeros((2, 2), np.uint32), 20),
    ],
)
def test_words_of_another_type_or_shape_are_refused(words: np.ndarray, bits: int) -> None:
    with pytest.raises(ValueError, match="takes a vector"):
        packing.pack(words, bits)


def test_a_ring_or_count_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bits"):
        packing.packed_bytes(1, 15)
    with pytest.raises(ValueError, match="65 bits"):
        packing.unpack(b"", 0, 65)
    with pytest.raises(ValueError, match="-1 words"):
        packing.unpack(b"", -1, 20)

"""Masks: uniform words that cancel, any slice of which can be made alone."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from lepton_fed.privacy.secagg import masks
from tests.unit.privacy.secagg import naive

KEY = bytes(range(16))
BITS = st.integers(16, 64)
SEGMENT = masks.SEGMENT_BYTES  # the borders that slices are laid across
TASK = masks._TASK_SEGMENTS * SEGMENT


def key_of(number: int, length: int = 16) -> bytes:
    return number.to_bytes(4, "big") + bytes(length - 4)


@given(bits=BITS, start=st.integers(0, 2**40), count=st.integers(0, 9), long=st.booleans())
@example(bits=32, start=2**62, count=5, long=False)
@example(bits=32, start=2 * 32_768 - 3, count=6, long=True)
@example(bits=64, start=3 * 16_384 - 1, count=2, long=False)
@settings(max_examples=60, deadline=None)
def test_words_are_those_of_aes_one_block_at_a_time(
    bits: int, start: int, count: int, long: bool
) -> None:
    key = key_of(bits, 32 if long else 16)
    made = masks.stream(key, count, bits=bits, start=start)
    assert made.tolist() == naive.mask(key, count, bits, start)


def test_the_first_words_are_the_ciphertext_of_gcms_own_test_case_2() -> None:
    """A key and a nonce of zeros: D. McGrew and J. Viega, The Galois/Counter Mode, 2005."""
    expected = "0388dace60b6a392f328c2b971b2fe78"
    assert masks.stream(bytes(16), 4).astype("<u4").tobytes().hex() == expected
    assert masks.stream(bytes(16), 2, bits=64).astype("<u8").tobytes().hex() == expected
    sealed = naive.gcm_seal(bytes(16), bytes(12), bytes(16), b"")
    assert sealed.hex() == expected + "ab6e47d42cec13bdf53a67b21257bddf"


@pytest.mark.parametrize("bits", [20, 32, 33, 64])
def test_any_slice_is_the_slice_of_the_whole(bits: int) -> None:
    """Over two tasks and their segments, with borders hit, missed by one, and inside a block."""
    per_segment = SEGMENT // masks.words_dtype(bits).itemsize
    size = (TASK + 3 * SEGMENT) // masks.words_dtype(bits).itemsize + 5
    whole = masks.stream(KEY, size, bits=bits)
    near = [
        0,
        1,
        2,
        3,
        4,
        5,
        per_segment - 1,
        per_segment,
        per_segment + 1,
        2 * per_segment + 7,
        size - 1,
    ]
    for low, high in itertools.combinations(sorted([*near, size]), 2):
        made = masks.stream(KEY, high - low, bits=bits, start=low)
        assert (made == whole[low:high]).all(), (low, high)


@given(bits=BITS, cuts=st.lists(st.integers(0, 50), max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_vector_masked_by_slices_is_the_vector_masked_whole(bits: int, cuts: list[int]) -> None:
    base = np.arange(50, dtype=masks.words_dtype(bits)) << masks.words_dtype(bits).type(3)
    plus, minus = [key_of(1), key_of(2, 32)], [key_of(3)]
    whole, by_slices = base.copy(), base.copy()
    masks.apply(whole, plus=plus, minus=minus, bits=bits)
    for low, high in itertools.pairwise([0, *sorted(cuts), 50]):
        masks.apply(by_slices[low:high], plus=plus, minus=minus, bits=bits, start=low)
    assert (whole == by_slices).all()


@given(bits=BITS, indexes=st.sets(st.integers(1, 300), min_size=2, max_size=7), size=st.just(9))
@settings(max_examples=60, deadline=None)
def test_pairwise_masks_cancel_over_any_set_of_sites(
    bits: int, indexes: set[int], size: int
) -> None:
    modulus = 2**bits
    total = [0] * size
    for site in indexes:
        words = np.zeros(size, dtype=masks.words_dtype(bits))
        for other in indexes - {site}:
            key = key_of(min(site, other) * 1000 + max(site, other))
            side = "plus" if masks.pair_sign(site, other) > 0 else "minus"
            masks.apply(words, **{side: [key]}, bits=bits)
        assert len(indexes) > 2 or words.any()
        total = [(a + b) % modulus for a, b in zip(total, words.tolist(), strict=True)]
    assert total == [0] * size


@given(bits=BITS, values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_masks_are_added_and_taken_off_modulo_the_ring(bits: int, values: list[int]) -> None:
    dtype = masks.words_dtype(bits)
    words = np.array([v % 2**bits for v in values], dtype=dtype)
    before = words.copy()
    keys = [key_of(n) for n in range(3)]
    masks.apply(words, plus=keys, bits=bits, start=11)
    added = [naive.mask(key, len(values), bits, 11) for key in keys]
    expected = [sum(column) % 2**bits for column in zip(before.tolist(), *added, strict=True)]
    assert words.tolist() == expected
    masks.apply(words, minus=keys, bits=bits, start=11)
    assert (words == before).all()


@pytest.mark.parametrize("bits", [20, 32, 64])
@pytest.mark.parametrize("workers", [2, 3, None])
def test_threads_change_nothing(bits: int, workers: int | None) -> None:
    size = 2 * TASK // 4 + 12_345
    plus, minus = [key_of(1), key_of(2)], [key_of(3)]
    one, many = (np.zeros(size, dtype=masks.words_dtype(bits)) for _ in range(2))
    masks.apply(one, plus=plus, minus=minus, bits=bits, start=3, workers=1)
    masks.apply(many, plus=plus, minus=minus, bits=bits, start=3, workers=workers)
    assert (one == many).all()


def test_a_long_vector_is_shared_among_threads_and_a_short_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, range]] = []
    apply_to_part = masks._apply_to_part

    def watched(words, part, *more):
        seen.append((threading.current_thread().name, part))
        apply_to_part(words, part, *more)

    monkeypatch.setattr(masks, "_apply_to_part", watched)
    masks.apply(np.zeros(3 * TASK // 4, dtype=np.uint32), plus=[KEY], workers=2)
    here = threading.current_thread().name
    assert here not in {name for name, _ in seen}
    assert sorted(part.start for _, part in seen) == [0, 32, 64]
    assert {len(part) for _, part in seen} == {32}
    seen.clear()
    masks.apply(np.zeros(SEGMENT // 4, dtype=np.uint32), plus=[KEY], workers=2)
    assert seen == [(here, range(1))]


def test_tasks_are_whole_segments_and_each_core_has_one() -> None:
    assert list(masks._parts(0, 4 * SEGMENT, 2)) == [range(2), range(2, 4)]
    assert list(masks._parts(SEGMENT - 4, 8, 2)) == [range(1), range(1, 2)]
    assert list(masks._parts(SEGMENT, SEGMENT + 4, 3)) == [range(1, 2), range(2, 3)]
    assert list(masks._parts(12, 0, 2)) == []


def test_a_failure_in_a_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(masks, "_apply_to_part", broken)
    with pytest.raises(MemoryError):
        masks.apply(np.zeros(TASK, dtype=np.uint32), plus=[KEY], workers=2)


@pytest.mark.parametrize(
    ("words", "keys", "options", "said"),
    [
        (np.zeros(3, np.uint64), [KEY], {"bits": 32}, "takes a vector of uint32, not uint64"),
        (np.zeros(3, np.uint32), [KEY], {"bits": 33}, "takes a vector of uint64, not uint32"),
        (np.zeros(3, np.int32), [KEY], {}, "takes a vector of uint32, not int32"),
        (np.zeros(3, np.float32), [KEY], {}, "takes a vector of uint32, not float32"),
        (np.zeros((2, 2), np.uint32), [KEY], {}, "of 2 dimensions"),
        (np.zeros(6, np.uint32)[::2], [KEY], {}, "not contiguous"),
        (np.frombuffer(bytes(12), np.uint32), [KEY], {}, "writable"),
        (np.zeros(3, np.uint32), [KEY], {"bits": 15}, "15 bits is not between 16 and 64"),
        (np.zeros(3, np.uint32), [KEY], {"bits": 65}, "65 bits is not between 16 and 64"),
        (np.zeros(3, np.uint32), [KEY], {"start": -1}, "from word -1"),
        (np.zeros(3, np.uint32), [KEY], {"workers": 0}, "0 threads"),
        (np.zeros(3, np.uint32), [KEY, b""], {}, "0 bytes, not 16 or 32"),
        (np.zeros(3, np.uint32), [bytes(24)], {}, "24 bytes, not 16 or 32"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(words, keys, options, said) -> None:
    before = words.copy()
    for side in ("plus", "minus"):
        with pytest.raises(ValueError, match=said):
            masks.apply(words, **{side: keys}, **options)
    assert (words == before).all()


def test_a_slice_of_negative_length_and_a_pair_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="slice of -1 words"):
        masks.stream(KEY, -1)
    with pytest.raises(ValueError, match="no mask with itself"):
        masks.pair_sign(3, 3)
    assert (masks.pair_sign(1, 2), masks.pair_sign(2, 1)) == (1, -1)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert masks.cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert masks.cores() == 7
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert masks.cores() == 1


def uniformity(words: np.ndarray, bits: int) -> list[float]:
    """Return p-values: of each byte of the ring, of the top bits, of neighbours' low nibbles."""
    found = []
    for shift in range(0, bits - 7, 4):
        cells = np.bincount((words >> shift & 255).astype(np.uint8), minlength=256)
        found.append(float(stats.chisquare(cells).pvalue))
    nibbles = (words & 15).astype(np.uint8)
    pairs = nibbles[: nibbles.size // 2 * 2].reshape(-1, 2)
    cells = np.bincount(pairs[:, 0] * np.uint8(16) + pairs[:, 1], minlength=256)
    return [*found, float(stats.chisquare(cells).pvalue)]


@pytest.mark.parametrize("bits", [16, 20, 32, 47, 64])
def test_the_masked_words_of_an_all_zero_update_are_uniform(bits: int) -> None:
    words = np.zeros(1_000_003, dtype=masks.words_dtype(bits))
    masks.apply(words, plus=[key_of(7), key_of(8)], minus=[key_of(9)], bits=bits)
    assert int(words.max()) < 2**bits
    values = uniformity(words, bits)
    assert min(values) > 1e-3 / len(values)


def test_the_chi_square_finds_what_masks_must_not_look_like() -> None:
    """Words that never reach the modulus, as randint(0, 2**bits - 1) makes them; and counters."""
    words = masks.stream(KEY, 1_000_003, bits=16)
    assert min(uniformity(np.minimum(words, 2**16 - 257), 16)) < 1e-6
    assert min(uniformity(np.arange(1_000_003, dtype=np.uint32), 20)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("bits", [20, 32])
def test_a_hundred_million_masked_words_of_an_all_zero_update_are_uniform(bits: int) -> None:
    """Ten sites' masks on zeros, 1e8 words: every byte, and 65 536 cells of the low 16 bits."""
    words = np.zeros(100_000_000, dtype=np.uint32)
    masks.apply(
        words,
        plus=[key_of(n) for n in range(5)],
        minus=[key_of(n) for n in range(5, 10)],
        bits=bits,
    )
    values = uniformity(words, bits)
    values.append(float(stats.chisquare(np.bincount((words & 0xFFFF).astype(np.uint16))).pvalue))
    assert min(values) > 1e-3 / len(values)

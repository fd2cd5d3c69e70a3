"""What is masked adds up: vectors, weights, counts, and how many there are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.core.ring import RingEncoding, RingSum
from lepton_fed.privacy.secagg.masks import words_dtype
from lepton_fed.privacy.secagg.vector import COUNT_BOUND, MaskedLayout

BITS = [20, 24, 32, 33, 48, 64]


def layout(bits: int = 32, cohort: int = 5, size: int = 7, counts: int = 3) -> MaskedLayout:
    encoding = RingEncoding.plan(
        cohort=cohort, coordinate_bound=4.0, weight_bound=1000.0, bits=bits
    )
    return MaskedLayout(encoding, ("delta", "control"), size, counts)


def contributions(masked: MaskedLayout, number: int, seed: int) -> list[tuple]:
    generator = np.random.default_rng(seed)
    return [
        (
            {
                name: generator.uniform(-4, 4, masked.size).astype(np.float32)
                for name in masked.names
            },
            float(generator.uniform(0.5, 1000)),
            generator.normal(0, 1e4, masked.counts),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("bits", BITS)
def test_the_sum_is_that_of_a_plain_ring_sum(bits: int) -> None:
    masked = layout(bits)
    sites = contributions(masked, 5, bits)
    total = np.zeros(masked.words, dtype=words_dtype(bits))
    plain = {name: RingSum(masked.encoding, masked.size) for name in masked.names}
    for vectors, weight, counts in sites:
        words, saturated = masked.encode(vectors, weight, counts)
        assert words.dtype == total.dtype
        assert int(words.max()) >> bits == 0
        assert saturated == 0
        total += words
        for name, vector in vectors.items():
            plain[name].add(vector, weight)
    total &= total.dtype.type(2**bits - 1)
    opened = masked.open(total)
    for name in masked.names:
        np.testing.assert_array_equal(opened.vectors[name], plain[name].total())
    assert opened.weight == plain["delta"].weight
    assert (opened.replies, opened.saturated) == (5, 0)
    expected = [math.fsum(column) for column in zip(*(c for _, _, c in sites), strict=True)]
    np.testing.assert_allclose(opened.counts, expected, atol=5 * 2**-25, rtol=0)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    number=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    counts=st.lists(
        st.floats(-1e300, 1e300) | st.integers(-(2**40), 2**40).map(float), min_size=1, max_size=4
    ),
)
def test_numbers_survive_any_cohort(bits: int, number: int, seed: int, counts: list[float]) -> None:
    if number.bit_length() + 10 > bits:  # sign, room for rounding, and eight significant bits
        return
    masked = layout(bits, cohort=number, size=2, counts=len(counts))
    ((vectors, weight, _),) = contributions(masked, 1, seed)
    words, _ = masked.encode(vectors, weight, np.array(counts))
    total = (words.astype(object) * number) % 2**bits
    opened = masked.open(total.astype(words.dtype))
    assert opened.replies == number
    assert opened.weight == number * masked.encoding.encode_weight(weight)
    for found, count in zip(opened.counts, counts, strict=True):
        inside = min(max(count, -COUNT_BOUND), COUNT_BOUND)
        assert found == pytest.approx(number * inside, abs=number * 2**-25, rel=1e-15)


def test_saturated_coordinates_are_counted() -> None:
    masked = layout(counts=0)
    vectors = {"delta": np.full(7, 9, np.float32), "control": np.zeros(7, np.float32)}
    vectors["control"][:2] = -4.5, 4.0
    words, saturated = masked.encode(vectors, 1.0)
    assert saturated == 8
    assert masked.open(words).saturated == 8


@pytest.mark.parametrize(
    ("vectors", "weight", "counts", "why"),
    [
        ({"delta": np.zeros(7)}, 1.0, np.zeros(3), "vectors"),
        ({"delta": np.zeros(7), "control": np.zeros(6)}, 1.0, np.zeros(3), "shape"),
        ({"delta": np.full(7, np.nan), "control": np.zeros(7)}, 1.0, np.zeros(3), "NaN"),
        ({"delta": np.zeros(7), "control": np.zeros(7)}, 0.0, np.zeros(3), "weight"),
        ({"delta": np.zeros(7), "control": np.zeros(7)}, 1001.0, np.zeros(3), "weight"),
        ({"delta": np.zeros(7), "control": np.zeros(7)}, 1.0, np.zeros(2), "counts"),
        ({"delta": np.zeros(7), "control": np.zeros(7)}, 1.0, None, "counts"),
        ({"delta": np.zeros(7), "control": np.zeros(7)}, 1.0, np.full(3, np.inf), "counts"),
    ],
)
def test_what_cannot_be_encoded_is_refused(vectors, weight, counts, why) -> None:
    with pytest.raises(ValueError, match=why):
        layout().encode(vectors, weight, counts)


def test_what_is_no_sum_is_refused() -> None:
    masked = layout()
    ((vectors, weight, counts),) = contributions(masked, 1, 3)
    words, _ = masked.encode(vectors, weight, counts)
    for wrong in (
        words[:-1],
        words.astype(np.uint64),
        np.zeros_like(words),
        (words.astype(np.uint64) * 6 % 2**32).astype(np.uint32),  # more than the cohort
        np.random.default_rng(1).integers(0, 2**32, masked.words, np.uint32),  # masks are left
    ):
        with pytest.raises(ValueError, match="sum"):
            masked.open(wrong)


def test_a_ring_too_small_for_the_cohort_is_refused() -> None:
    with pytest.raises(ValueError, match="use a larger ring"):
        MaskedLayout(RingEncoding(16, 3, 4.0, 1.0, 2**16), ("delta",), 3)


def test_a_parameter_takes_little_more_than_its_word() -> None:
    masked = MaskedLayout(
        RingEncoding.plan(cohort=200, coordinate_bound=1.0, weight_bound=1.0, bits=32),
        ("delta",),
        1_000_000,
        counts=100,
    )
    assert masked.words * 4 <= 4.1 * 1_000_000

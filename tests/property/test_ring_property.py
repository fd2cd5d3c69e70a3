"""The ring sum does not depend on the order of replies, to the bit, and is what integers say it is.

The second implementation here keeps one Python integer a coordinate: no arrays, no wrap-around, no
slices. From the product of a coordinate and its weight on, both must agree exactly.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.core.ring import WEIGHT_BITS, RingEncoding, RingSum

Reply = tuple[list[float], float]

EXTREMES = [0.0, -0.0, 5e-324, -5e-324, 1e-45, 2.0**-126, 1e30, -1e30, 3.4e38, -3.4e38]


@st.composite
def encodings(draw: st.DrawFn) -> RingEncoding:
    bound = draw(
        st.one_of(
            st.sampled_from([1e-200, 0.1, 1.0, 3.0, 1e4, 1e12, 2.0**34]),
            st.floats(1e-30, 1e30),
        )
    )
    return RingEncoding.plan(
        cohort=draw(st.integers(6, 3000)),
        coordinate_bound=bound,
        weight_bound=draw(st.sampled_from([1.0, 1e-3, 7.0, 1e6])),
        bits=draw(st.sampled_from([32, 40, 63, 64])),
    )


@st.composite
def rounds(draw: st.DrawFn) -> tuple[RingEncoding, list[Reply]]:
    """A ring and the replies of a round; a coordinate may lie on the bound or beyond it."""
    encoding = draw(encodings())
    bound, size = encoding.coordinate_bound, draw(st.integers(1, 4))
    coordinate = st.one_of(
        st.floats(-bound, bound),
        st.sampled_from([bound, -bound, 1.5 * bound, -2 * bound, bound / 3, *EXTREMES]),
    )
    least = encoding.weight_bound * 2.0 ** -(WEIGHT_BITS - 1)
    weight = st.one_of(
        st.floats(least, encoding.weight_bound),
        st.sampled_from([least, encoding.weight_bound, encoding.weight_bound / 3]),
    )
    reply = st.tuples(st.lists(coordinate, min_size=size, max_size=size), weight)
    return encoding, draw(st.lists(reply, min_size=1, max_size=6))


def ring_sum(encoding: RingEncoding, replies: list[Reply], dtype: Any = np.float64) -> RingSum:
    total = RingSum(encoding, len(replies[0][0]))
    for values, weight in replies:
        total.add(np.array(values, dtype=dtype), weight)
    return total


def scaled(encoding: RingEncoding, value: float, weight: float) -> int:
    """One coordinate of one reply as an integer, made with Python's own arithmetic."""
    fraction = Fraction(round(weight / encoding.weight_bound * 2**WEIGHT_BITS), 2**WEIGHT_BITS)
    scale = float(fraction * Fraction(2) ** encoding.fraction_bits)
    limit = encoding.coordinate_bound * scale
    return round(min(max(value * scale, -limit), limit))


@given(rounds(), st.randoms(use_true_random=False))
def test_every_order_of_replies_gives_the_same_bits(
    case: tuple[RingEncoding, list[Reply]], random: Any
) -> None:
    encoding, replies = case
    shuffled = replies[:]
    random.shuffle(shuffled)
    one, other = ring_sum(encoding, replies), ring_sum(encoding, shuffled)
    assert one.total().tobytes() == other.total().tobytes()
    assert one.mean().tobytes() == other.mean().tobytes()
    assert (one.weight, one.saturated) == (other.weight, other.saturated)


@given(st.data())
def test_every_order_gives_the_same_bits_for_float32_updates(data: st.DataObject) -> None:
    encoding = RingEncoding.plan(cohort=8, coordinate_bound=1e4, weight_bound=1.0)
    vector = st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3)
    reply = st.tuples(vector, st.floats(1e-9, 1.0))
    replies = data.draw(st.lists(reply, min_size=2, max_size=8))
    shuffled = data.draw(st.permutations(replies))
    means = {
        ring_sum(encoding, order, np.float32).mean().tobytes() for order in (replies, shuffled)
    }
    assert len(means) == 1


@given(rounds())
def test_the_sum_is_the_sum_of_python_integers_modulo_the_ring(
    case: tuple[RingEncoding, list[Reply]],
) -> None:
    encoding, replies = case
    total = ring_sum(encoding, replies)
    for place, found in enumerate(total.total().tolist()):
        exact = sum(scaled(encoding, values[place], weight) for values, weight in replies)
        assert found == exact % 2**encoding.bits
        assert abs(exact) < 2 ** (encoding.bits - 1)  # hence nothing was lost by wrapping
    assert encoding.decode(total.total()).tolist() == total.sum().tolist()


@given(rounds())
def test_the_mean_is_within_the_documented_bound_of_the_exact_one(
    case: tuple[RingEncoding, list[Reply]],
) -> None:
    encoding, replies = case
    mean = ring_sum(encoding, replies).mean()
    bound = Fraction(encoding.coordinate_bound)
    weights = [
        Fraction(round(weight / encoding.weight_bound * 2**WEIGHT_BITS), 2**WEIGHT_BITS)
        for _, weight in replies
    ]
    allowed = encoding.error_bound(len(replies), float(sum(weights)))
    for place, found in enumerate(mean.tolist()):
        values = [min(max(Fraction(values[place]), -bound), bound) for values, _ in replies]
        exact = sum(x * w for x, w in zip(values, weights, strict=True)) / sum(weights)
        assert abs(Fraction(found) - exact) <= Fraction(allowed)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([-1.0, 1.0, 0.5, -0.25]), min_size=1, max_size=60))
def test_a_sum_that_wraps_midway_ends_where_python_integers_end(values: list[float]) -> None:
    """Too fine a grid on purpose: five ones leave half the ring, and the mask brings them back."""
    for bits in (20, 64):
        encoding = RingEncoding(
            bits=bits, fraction_bits=bits - 3, coordinate_bound=1.0, weight_bound=1.0, cohort=60
        )
        total = ring_sum(encoding, [([value], 1.0) for value in values])
        integers = sum(int(value * 2 ** (bits - 3)) for value in values)
        assert total.total().tolist() == [integers % 2**bits]
        half = 2 ** (bits - 1)
        signed = (integers + half) % 2**bits - half
        assert total.sum().tolist() == [signed / 2 ** (bits - 3)]

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from lepton_fed.core.ring import WEIGHT_BITS, RingEncoding, RingSum

FULL = 1 << WEIGHT_BITS  # a weight at its bound


def plan(cohort: int = 4, bound: float = 8.0, weight: float = 1.0, bits: int = 64) -> RingEncoding:
    return RingEncoding.plan(cohort=cohort, coordinate_bound=bound, weight_bound=weight, bits=bits)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e300])
def test_a_plan_refuses_a_coordinate_bound_it_cannot_encode(bound: float) -> None:
    with pytest.raises(ValueError, match="coordinate bound"):
        plan(bound=bound)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_plan_refuses_a_weight_bound_that_is_none(weight: float) -> None:
    with pytest.raises(ValueError, match="weight bound"):
        plan(weight=weight)


@pytest.mark.parametrize(("cohort", "bits"), [(0, 64), (-1, 64), (1, 15), (1, 65), (1, 0)])
def test_a_plan_refuses_a_cohort_or_ring_out_of_range(cohort: int, bits: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        plan(cohort=cohort, bits=bits)


@pytest.mark.parametrize(("bits", "largest"), [(16, 64), (20, 1024), (32, 2**22)])
def test_a_plan_refuses_a_cohort_that_leaves_fewer_than_eight_bits(bits: int, largest: int) -> None:
    assert plan(cohort=largest, bits=bits).fraction_bits == 8 - 3
    with pytest.raises(ValueError, match="leaves 7 bits"):
        plan(cohort=largest + 1, bits=bits)


@pytest.mark.parametrize("bound", [1e-270, 0.1, 1.0, 3.0, 1e4, 1e12, 1e270])
@pytest.mark.parametrize("cohort", [1, 3, 1000, 1_000_000])
@pytest.mark.parametrize("bits", [32, 64])
def test_a_cohort_at_the_bound_stays_within_half_the_ring(
    bound: float, cohort: int, bits: int
) -> None:
    encoding = plan(cohort=cohort, bound=bound, bits=bits)
    encoded, _ = encoding.encode(np.array([bound, -bound]), FULL)
    largest = int(encoded[0])
    assert int(encoded[1]) == 2**bits - largest
    assert cohort * largest < 2 ** (bits - 1)


def test_the_grid_is_as_fine_as_ring_and_double_precision_allow() -> None:
    assert plan(cohort=1, bound=1.0).grid == 2.0**-52
    assert plan(cohort=1, bound=1024.0).grid == 2.0**-42
    assert plan(cohort=2**20, bound=1.0).grid == 2.0**-42
    assert plan(cohort=1, bound=1.0, bits=32).grid == 2.0**-30


@pytest.mark.parametrize("weight", [0.0, -1e-9, 5.0000001, math.nan, math.inf, -math.inf])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"is not in \(0, 5\]"):
        plan(weight=5.0).encode_weight(weight)


def test_a_weight_beyond_any_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is not in \(0, 5\]"):
        plan(weight=5.0).encode_weight(10**400)


def test_a_weight_that_rounds_to_nothing_is_refused() -> None:
    encoding = plan(weight=1024.0)
    smallest = 1024.0 * 2.0 ** -(WEIGHT_BITS + 1)
    assert encoding.encode_weight(math.nextafter(smallest, 1)) == 1
    with pytest.raises(ValueError, match="too small beside 1024"):
        encoding.encode_weight(smallest)


def test_weights_are_fractions_of_their_bound() -> None:
    encoding = plan(weight=200.0)
    assert encoding.encode_weight(200.0) == FULL
    assert encoding.encode_weight(50.0) == FULL // 4
    assert encoding.bits_lost_to_weight(50.0) == 2.0


def test_coordinates_beyond_the_bound_are_cut_and_counted() -> None:
    values = np.array([8.0, 8.0000001, -9.0, 0.0, 1e30, -math.inf, -8.0])
    encoded, saturated = plan().encode(values, FULL)
    assert saturated == 4
    assert plan().decode(encoded).tolist() == [8.0, 8.0, -8.0, 0.0, 8.0, -8.0, -8.0]


def test_a_bound_that_single_precision_has_not_still_counts() -> None:
    """0.1 is larger in single precision than in double: the comparison must not be in single."""
    total = RingSum(plan(bound=0.1), 1)
    total.add(np.array([0.1], dtype=np.float32), 1.0)
    assert total.saturated == 1
    assert total.mean()[0] == pytest.approx(0.1, abs=2**-54)


def test_saturation_is_counted_over_all_replies_and_slices() -> None:
    size = 100_003
    total = RingSum(plan(), size)
    values = np.zeros(size)
    values[[0, 50_000, size - 1]] = 10
    total.add(values, 1.0)
    total.add(-values, 0.5)
    assert total.saturated == 6
    assert total.mean()[[0, 1, size - 1]] == pytest.approx([8 * 0.5 / 1.5, 0, 8 * 0.5 / 1.5])


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00001, 0x7FA00000], ids=hex)
def test_nan_of_any_kind_is_refused_and_changes_nothing(bits: int) -> None:
    size = 70_000
    total = RingSum(plan(), size)
    total.add(np.full(size, 1.5, dtype=np.float32), 1.0)
    before = total.total()
    broken = np.full(size, 9.0, dtype=np.float32)  # beyond the bound: must not be counted either
    broken[-1] = np.array([bits], dtype=np.uint32).view(np.float32)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="NaN"):
            total.add(broken, 1.0)
    assert np.array_equal(total.total(), before)
    assert (total.replies, total.weight, total.saturated) == (1, FULL, 0)


@pytest.mark.parametrize(
    ("values", "weight", "what"),
    [
        (np.zeros(2), 1.0, r"shape \(2,\)"),
        (np.zeros((3, 1)), 1.0, r"shape \(3, 1\)"),
        (np.zeros(1), 1.0, r"shape \(1,\)"),
        (np.ones(3), 0.0, "weight"),
        (np.ones(3), 1.5, "weight"),
    ],
)
def test_a_reply_that_does_not_fit_changes_nothing(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], weight: float, what: str
) -> None:
    total = RingSum(plan(), 3)
    with pytest.raises(ValueError, match=what):
        total.add(values, weight)
    assert (total.replies, total.weight, total.total().tolist()) == (0, 0, [0, 0, 0])


def test_more_replies_than_planned_are_refused() -> None:
    total = RingSum(plan(cohort=2), 1)
    total.add(np.ones(1), 1.0)
    total.add(np.ones(1), 1.0)
    with pytest.raises(ValueError, match="planned for 2 replies"):
        total.add(np.ones(1), 1.0)
    assert total.mean().tolist() == [1.0]


def test_a_sum_of_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no replies"):
        RingSum(plan(), 2).mean()


def test_an_empty_vector_has_an_empty_mean() -> None:
    total = RingSum(plan(), 0)
    total.add(np.zeros(0, dtype=np.float32), 1.0)
    assert total.mean().shape == (0,)


def test_a_sum_that_leaves_the_ring_midway_comes_back() -> None:
    """Only the end counts: 5 - 3 eighths of the ring, though 4 eighths do not fit its half."""
    encoding = RingEncoding(
        bits=64, fraction_bits=61, coordinate_bound=1.0, weight_bound=1.0, cohort=8
    )
    total = RingSum(encoding, 2)
    for _ in range(5):
        total.add(np.array([1.0, -1.0]), 1.0)
    assert total.total().tolist() == [5 * 2**61, 2**64 - 5 * 2**61]
    assert total.sum().tolist() == [-3.0, 3.0]  # wrapped: 5 is 5 - 8 in this ring
    for _ in range(3):
        total.add(np.array([-1.0, 1.0]), 1.0)
    assert total.sum().tolist() == [2.0, -2.0]


@pytest.mark.parametrize("bits", [16, 20, 32, 48, 63])
def test_a_smaller_ring_wraps_at_its_own_size(bits: int) -> None:
    encoding = RingEncoding(
        bits=bits, fraction_bits=bits - 3, coordinate_bound=1.0, weight_bound=1.0, cohort=8
    )
    total = RingSum(encoding, 2)
    for _ in range(5):
        total.add(np.array([1.0, -1.0]), 1.0)
        assert (total.total() < 2**bits).all()
    assert total.sum().tolist() == [-3.0, 3.0]
    for _ in range(3):
        total.add(np.array([-1.0, 1.0]), 1.0)
    assert total.sum().tolist() == [2.0, -2.0]


@pytest.mark.parametrize("bits", [20, 32, 64])
def test_a_mean_in_any_ring_is_within_its_error_bound(bits: int) -> None:
    encoding = plan(cohort=3, bound=2.0, weight=4.0, bits=bits)
    replies = [(np.array([1.9, -0.3, 2.0]), 4.0), (np.array([-2.0, 1e-9, 0.7]), 1.0)]
    total = RingSum(encoding, 3)
    for values, weight in replies:
        total.add(values, weight)
    exact = sum(values * weight for values, weight in replies) / 5.0
    assert np.abs(total.mean() - exact).max() <= encoding.error_bound(2, 1.25)


def test_signs_survive_the_ring() -> None:
    encoding = plan(cohort=1, bits=20)
    values = np.array([-encoding.grid, encoding.grid, -8.0, 8.0, 0.0])
    encoded, _ = encoding.encode(values, FULL)
    assert encoded[0] == 2**20 - 1
    assert encoding.decode(encoded).tolist() == values.tolist()


def test_sites_that_agree_get_their_coordinate_back_whatever_their_weights() -> None:
    encoding = plan(cohort=3, weight=1000.0)
    total = RingSum(encoding, 1)
    for weight in (1.0, 333.3, 999.9):
        total.add(np.array([0.7]), weight)
    assert total.mean()[0] == pytest.approx(0.7, abs=encoding.error_bound(3, 1.3342))


def test_a_total_is_a_copy() -> None:
    total = RingSum(plan(), 1)
    total.add(np.ones(1), 1.0)
    total.total()[0] = 0
    assert total.mean().tolist() == [1.0]


def test_a_sum_is_turned_into_its_mean_in_its_own_memory() -> None:
    size = 40_000  # several slices
    kept, given = RingSum(plan(), size), RingSum(plan(), size)
    for number in (1, 2):
        values = np.random.default_rng(number).standard_normal(size)
        kept.add(values, 0.5 * number)
        given.add(values, 0.5 * number)
    memory = given._total
    mean = given.into_mean()
    assert np.shares_memory(mean, memory)
    assert np.array_equal(mean, kept.mean())
    assert (given.replies, given.weight, given.total().any()) == (0, 0, False)
    with pytest.raises(ValueError, match="no replies"):
        given.into_mean()

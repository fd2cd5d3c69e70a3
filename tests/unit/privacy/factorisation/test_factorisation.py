"""Banded factorisations against dense matrices, and the stream of noise against a solver."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of, noise_multiplier_for
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.factorisation.mechanism import (
    BandedMechanism,
    FixedOrder,
    largest_band,
)
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.privacy.factorisation.toeplitz import (
    best_band,
    inverse,
    moved_squares,
    prefix_error,
    sensitivity,
    square_root,
)

KEY = bytes(range(32))
ERRORS = [  # steps, participations, DP-SGD, band 8, band 32, best
    (200, 1, 10.0, 4.4, 2.9, 2.6),
    (200, 4, 20.1, 8.8, 5.9, 5.4),
    (1000, 1, 22.4, 9.4, 5.5, 3.1),
    (1000, 10, 70.8, 29.8, 17.3, 12.1),
]


def dense(coefficients, steps):
    matrix = np.zeros((steps, steps))
    for offset, value in enumerate(coefficients[:steps]):
        matrix += np.diag(np.full(steps - offset, value), -offset)
    return matrix


def patterns(steps, participations, separation):
    for count in range(1, participations + 1):
        for pattern in itertools.combinations(range(steps), count):
            if all(b - a >= separation for a, b in itertools.pairwise(pattern)):
                yield list(pattern)


@pytest.mark.parametrize(("steps", "participations", "plain", "band8", "band32", "best"), ERRORS)
def test_errors_of_prefix_sums(steps, participations, plain, band8, band32, best):
    separation = steps // participations
    pattern = (steps, participations, separation)
    for band, error in ((1, plain), (8, band8), (32, band32)):
        # The table has one decimal.
        assert prefix_error(square_root(band), *pattern) == pytest.approx(error, rel=0.02, abs=0.05)
    found = best_band(*pattern)
    assert prefix_error(square_root(found), *pattern) == pytest.approx(best, rel=0.02, abs=0.05)
    assert 3.7 <= plain / best <= 7.3


def test_more_precisely_they_are_those_of_dense_matrices():
    for (steps, participations, separation), band in itertools.product(
        [(200, 1, 200), (200, 4, 50), (120, 7, 15), (50, 3, 20)], [1, 2, 8, 32, 50]
    ):
        matrix = dense(square_root(band), steps)
        prefix = np.linalg.solve(matrix.T, np.tril(np.ones((steps, steps))).T).T
        worst = max(
            np.linalg.norm(matrix[:, first::separation][:, :participations].sum(axis=1))
            for first in range(separation)
        )
        expected = np.linalg.norm(prefix) / math.sqrt(steps) * worst
        found = prefix_error(square_root(band), steps, participations, separation)
        assert found == pytest.approx(expected, rel=1e-9)


def test_the_full_square_root_is_one():
    matrix = dense(square_root(60), 60)
    np.testing.assert_allclose(matrix @ matrix, np.tril(np.ones((60, 60))), atol=1e-12)


@pytest.mark.parametrize("band", [1, 2, 3, 5, 11])
@pytest.mark.parametrize(("participations", "separation"), [(1, 1), (2, 1), (3, 2), (3, 4), (4, 3)])
def test_no_pattern_moves_more_than_the_sensitivity(band, participations, separation):
    steps = 11
    coefficients = square_root(band)
    matrix = dense(coefficients, steps)
    worst = max(
        np.linalg.norm(matrix[:, pattern].sum(axis=1))
        for pattern in patterns(steps, participations, separation)
    )
    found = sensitivity(coefficients, steps, participations, separation)
    assert found == pytest.approx(worst, rel=1e-12)


@pytest.mark.parametrize("band", [1, 2, 5, 10])
@pytest.mark.parametrize("separation", [1, 2, 4, 10, 15])
def test_no_pattern_moves_the_first_steps_more_than_is_charged_for_them(band, separation):
    """Each prefix by itself, over every pattern: they are what rounds are charged by."""
    steps = 10
    participations = -(-steps // separation)
    coefficients = square_root(band)
    matrix = dense(coefficients, steps)
    squares = moved_squares(coefficients, steps, participations, separation)
    assert squares[0] == 0
    assert (np.diff(squares) >= 0).all()
    for first in range(1, steps + 1):
        worst = max(
            np.square(matrix[:first, pattern].sum(axis=1)).sum()
            for pattern in patterns(first, -(-first // separation), separation)
        )
        assert squares[first] == pytest.approx(worst, rel=1e-12)


def test_deviations_are_those_of_dense_matrices():
    mechanism = BandedMechanism(40, 4, 10, 7)
    solved = np.linalg.inv(dense(square_root(7), 40))
    steps = np.linalg.norm(solved, axis=1)
    assert mechanism.step_deviation == pytest.approx(mechanism.sensitivity * steps.max())
    whole = np.linalg.norm(solved.sum(axis=0))
    assert mechanism.sum_deviation == pytest.approx(mechanism.sensitivity * whole)


def test_past_noise_takes_a_quarter_of_a_gibibyte_at_most():
    assert largest_band(10_000_000) == 7
    assert 6 * 4 * 10_000_000 <= 256 * 2**20 < 7 * 4 * 10_000_000
    assert largest_band(10**9) == 1


def test_no_gradients_move_more_than_equal_ones():
    random = np.random.default_rng(0)
    matrix = dense(square_root(6), 12)
    found = sensitivity(square_root(6), 12, 3, 2)
    for pattern in patterns(12, 3, 2):
        gradients = np.zeros((12, 5))
        some = random.standard_normal((len(pattern), 5))
        gradients[pattern] = some / np.linalg.norm(some, axis=1, keepdims=True)
        assert np.linalg.norm(matrix @ gradients) <= found * (1 + 1e-12)


def test_the_inverse_is_one():
    for band, steps in ((1, 5), (4, 30), (30, 30), (40, 20)):
        product = dense(inverse(square_root(band), steps), steps) @ dense(square_root(band), steps)
        np.testing.assert_allclose(product, np.eye(steps), atol=1e-12)


@pytest.mark.parametrize("band", [1, 2, 7, 40, 60])
def test_the_stream_is_the_inverse_applied_to_fresh_noise(band):
    size, steps = 20_000, 40
    stream = CorrelatedNoise(square_root(band), size, 2.5, steps, Entropy(KEY))
    noise = np.stack([stream.next() for _ in range(steps)])
    fresh = Entropy(KEY)
    slices = [min(1 << 14, size - at) for at in range(0, size, 1 << 14)]
    drawn = [np.concatenate([fresh.normal(n) for n in slices]) for _ in range(steps)]
    expected = np.linalg.solve(dense(square_root(band), steps), 2.5 * np.stack(drawn))
    np.testing.assert_allclose(noise, expected, atol=2e-5)
    with pytest.raises(ValueError, match="more than 40"):
        stream.next()


def test_a_stream_goes_on_where_it_stopped():
    arguments = (square_root(5), 300, 1.5, 30)
    whole = CorrelatedNoise(*arguments, Entropy(KEY))
    expected = [whole.next() for _ in range(30)]
    entropy = Entropy(KEY)
    first = CorrelatedNoise(*arguments, entropy)
    noise = [first.next() for _ in range(17)]
    step, past = first.past()
    second = CorrelatedNoise(*arguments, entropy, past=(step, past.copy()))
    noise += [second.next() for _ in range(13)]
    np.testing.assert_array_equal(noise, expected)
    with pytest.raises(ValueError, match="more than 30"):
        second.next()
    for wrong in ((31, past), (-1, past), (3, past[:-1])):
        with pytest.raises(ValueError, match="noise of shape"):
            CorrelatedNoise(*arguments, entropy, past=wrong)


def test_memory_is_the_band_times_the_size():
    stream = CorrelatedNoise(square_root(8), 1000, 1.0, 50, Entropy(KEY))
    assert stream._past.nbytes == 7 * 1000 * 4
    assert CorrelatedNoise(square_root(1), 1000, 1.0, 50, Entropy(KEY))._past.nbytes == 0


def test_prefix_sums_of_the_stream_have_the_computed_error():
    mechanism = BandedMechanism(60, 3, 20, 16)
    stream = mechanism.noise(20_000, 0.5, 1.4, Entropy(KEY))
    prefix = np.cumsum([stream.next() for _ in range(60)], axis=0)
    found = math.sqrt(float(np.mean(prefix**2)))
    assert found == pytest.approx(mechanism.error * 1.4 * 0.5, rel=0.02)
    independent = BandedMechanism(60, 3, 20, 1)
    assert independent.error > 2 * mechanism.error


def test_a_training_costs_what_one_gaussian_costs():
    order = FixedOrder(500, 10, planned=200, band=50)
    noise = noise_multiplier_for(2.0, 1e-5, SampledGaussian(1.0, 1.0, 1))
    event = order.event(noise, 200)
    assert epsilon_of([event], 1e-5) == pytest.approx(2.0, abs=0.003)
    assert epsilon_of([event], 1e-5) >= epsilon_of([SampledGaussian(noise, 1.0, 1)], 1e-5) - 1e-9
    assert (event.adjacency, event.sampler, event.mechanism) == ("zero-out-one", "full", "dp_ftrl")
    # The same epsilon for independent noise: four steps have the record in them.
    plain = BandedMechanism(200, 4, 50, 1)
    assert plain.sensitivity == pytest.approx(2.0)
    assert plain.error / order.mechanism.error == pytest.approx(3.7, rel=0.02)
    assert plain.error == pytest.approx(order.mechanism.independent_error)


def test_records_come_back_after_one_pass_and_the_mechanism_knows():
    order = FixedOrder.of(103, 10, planned=30, most_band=1000)
    batches = list(order.batches(30, Entropy(KEY)))
    assert order.steps_per_epoch == 11
    assert (order.rate, order.divisor) == (10 / 103, 10)
    assert [batch.size for batch in batches[:11]] == [10] * 10 + [3]
    for row in (0, 57, 102):
        steps = [step for step, batch in enumerate(batches) if row in batch]
        assert len(steps) <= 3
        assert set(np.diff(steps)) == {11}
    resumed = list(order.at(20).batches(10, Entropy(KEY)))
    assert all((a == b).all() for a, b in zip(resumed, batches[20:], strict=True))
    mechanism = order.mechanism
    assert (mechanism.steps, mechanism.participations, mechanism.separation) == (30, 3, 11)
    assert mechanism.band == best_band(30, 3, 11)
    assert FixedOrder.of(103, 10, planned=30, most_band=4).band == 4
    assert order.at(20).event(1.0, 10).end == 30
    with pytest.raises(ValueError, match="no such steps"):
        order.at(25).event(1.0, 10)


def test_the_best_band_is_the_best_there_is():
    for pattern in ((40, 1, 40), (40, 2, 20), (60, 6, 10)):
        errors = {b: prefix_error(square_root(b), *pattern) for b in range(1, pattern[0] + 1)}
        found = best_band(*pattern)
        assert errors[found] <= 1.02 * min(errors.values())
        assert best_band(*pattern, most=3) <= 3


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="band"):
        square_root(0)
    for wrong in ((0, 1, 1), (5, 0, 1), (5, 1, 0)):
        with pytest.raises(ValueError, match="participations"):
            sensitivity(square_root(2), *wrong)
    for coefficients in ([1.0, -0.1], [0.5, 1.0]):
        with pytest.raises(ValueError, match="negative or increase"):
            sensitivity(np.array(coefficients), 5, 1, 1)
    for coefficients, size, deviation, steps in (
        ([], 1, 1.0, 1), ([0.0], 1, 1.0, 1), ([1.0], 0, 1.0, 1), ([1.0], 1, 0.0, 1),
        ([1.0], 1, math.nan, 1), ([1.0], 1, 1.0, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            CorrelatedNoise(np.array(coefficients), size, deviation, steps, Entropy(KEY))
    for rows, batch in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="batches"):
            FixedOrder(rows, batch, 5, 1)
    with pytest.raises(ValueError, match="step 6 of 5"):
        FixedOrder(10, 2, 5, 1, first=6)
    with pytest.raises(ValueError, match="band"):
        FixedOrder(10, 2, 5, 6)
    with pytest.raises(ValueError, match="band"):
        BandedMechanism(5, 1, 5, 6)
    with pytest.raises(ValueError, match="participations"):
        BandedMechanism(5, 0, 5, 1)
    with pytest.raises(ValueError, match="at most"):
        best_band(0, 1, 1)

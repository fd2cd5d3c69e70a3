"""The one-run bound against exact arithmetic, and against a mechanism whose epsilon is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from lepton_fed.audit.lower_bound import epsilon_proved, lower_bound, p_value


def slowly(canaries: int, guesses: int, right: int, odds: int, delta: Fraction) -> float:
    """Theorem 5.2 in exact arithmetic, epsilon = log(odds)."""
    chance = Fraction(odds, odds + 1)

    def at_least(count: int) -> Fraction:
        return sum(
            (
                math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
                for k in range(max(0, count), guesses + 1)
            ),
            Fraction(0),
        )

    steps = [(at_least(right - i) - at_least(right)) / i for i in range(1, right + 1)]
    return float(min(Fraction(1), at_least(right) + 2 * canaries * delta * max([*steps, 0])))


@pytest.mark.parametrize(("guesses", "right"), [(1, 1), (20, 0), (20, 15), (40, 40), (60, 41)])
@pytest.mark.parametrize("odds", [1, 2, 20])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 100_000)])
def test_the_p_value_is_the_theorem_s(guesses: int, right: int, odds: int, delta: Fraction) -> None:
    found = p_value(100, guesses, right, math.log(odds), float(delta))
    assert found == pytest.approx(slowly(100, guesses, right, odds, delta), rel=1e-9, abs=1e-15)


def test_a_hundred_right_guesses_prove_what_they_can_and_no_more() -> None:
    assert epsilon_proved(1000, 100, 100, 0.0, 0.05) == pytest.approx(
        math.log(0.05**0.01 / (1 - 0.05**0.01)), abs=2e-3
    )
    # Delta allows a little of what was seen.
    assert epsilon_proved(1000, 100, 100, 1e-5, 0.05) == pytest.approx(3.47, abs=0.02)
    assert epsilon_proved(1000, 100, 50, 1e-5, 0.05) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_of_a_mechanism_of_known_epsilon_it_is_below_in_95_of_100_runs_and_not_far_below(
    epsilon: float,
) -> None:
    # Randomised response of each canary is (epsilon, 0)-DP and tight.
    draws = np.random.default_rng(7)
    keeps = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for _ in range(200):
        included = draws.random(1000) < 0.5
        said = np.where(draws.random(1000) < keeps, included, ~included)
        ties = draws.random(1000) / 10
        found.append(lower_bound(said + ties, included, 0.0).epsilon)
    above = np.mean(np.array(found) > epsilon)
    assert above <= 0.05
    assert np.median(found) > 0.7 * epsilon


def test_scores_that_say_nothing_prove_nothing() -> None:
    draws = np.random.default_rng(8)
    assert lower_bound(draws.random(1000), draws.random(1000) < 0.5, 1e-5).epsilon < 0.3

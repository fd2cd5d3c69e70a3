"""From a target epsilon to the noise of each step, and to schedules that take less of it.

The comparison follows S. De et al.: Unlocking High-Accuracy Differentially Private Image
Classification through Scale, arXiv:2204.13650, and N. Ponomareva et al.: How to DP-fy ML, JAIR 77
(2023), section 5: at one epsilon, large batches and many steps lose less to the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.accounting import (
    Event,
    epsilon_of,
    guarantee_of,
    noise_multiplier_for,
)
from lepton_fed.privacy.dp.events import MOST_CORRELATED_STEPS
from lepton_fed.privacy.dp.sampling import PoissonSampler, Sampler
from lepton_fed.privacy.factorisation.mechanism import FixedOrder, largest_band

__all__ = [
    "NoisePlan",
    "better_plans",
    "epsilon_curve",
    "fixed_order",
    "plan_for",
    "require_delta",
    "steps_a_round",
]

_MOST_STEPS = 10_000_000  # beyond it composing the privacy loss takes minutes
_SUGGESTED = ((0.25, 400), (0.5, 1000))  # rate and steps of the run
_BETTER = 0.98  # of the noise-to-signal: less of a gain is not worth a line
_CURVE = (1, 2, 5)


@dataclass(frozen=True)
class NoisePlan:
    """How a site's rounds are sampled and noised.

    Args:
        sampler: Draws the batches.
        steps: Steps of one round.
        noise_multiplier: Standard deviation of the noise over the clipping norm; with correlated
            noise, over the sensitivity of the whole run.
    """

    sampler: Sampler
    steps: int
    noise_multiplier: float

    @property
    def round_event(self) -> Event:
        """Return what one round costs, the first where they differ."""
        return self.sampler.event(self.noise_multiplier, self.steps)

    @property
    def step_noise(self) -> float:
        """Return the noise-to-signal ratio of a step.

        The standard deviation of the noise in a coordinate of the mean gradient, over the largest
        norm that this gradient can have: both are in units of the clipping norm.
        """
        deviation = self.noise_multiplier
        if isinstance(self.sampler, FixedOrder):
            deviation *= self.sampler.mechanism.step_deviation
        return deviation / self.sampler.divisor

    @property
    def rows_a_round(self) -> float:
        """Return how many rows go through the model in a round, expected."""
        return self.steps * self.sampler.rate * self.sampler.rows

    def run_noise(self, rounds: int) -> float:
        """Return the noise-to-signal ratio of all steps of a run together.

        What the steps agree on adds up, and noise only by its square root.

        Args:
            rounds: Rounds of the run.
        """
        if isinstance(self.sampler, FixedOrder):
            deviation = self.noise_multiplier * self.sampler.mechanism.sum_deviation
            return deviation / (self.sampler.planned * self.sampler.divisor)
        return self.step_noise / math.sqrt(rounds * self.steps)


def steps_a_round(sampler: Sampler, epochs: int | None, steps: int | None) -> int:
    """Return the steps of a round.

    Args:
        sampler: Draws the batches.
        epochs: Passes over the rows; 1 if None.
        steps: Steps, instead of passes.
    """
    return (epochs or 1) * sampler.steps_per_epoch if steps is None else steps


def fixed_order(
    rows: int,
    expected_batch: int,
    epochs: int | None,
    steps: int | None,
    rounds: int,
    *,
    size: int,
    band: int | None = None,
) -> FixedOrder:
    """Return the order of a run's batches with correlated noise.

    Args:
        rows: Number of records at the site.
        expected_batch: Records in a step.
        epochs: Passes over the rows in a round; 1 if None.
        steps: Steps of a round, instead of passes.
        rounds: Rounds of the run.
        size: Coordinates of a gradient.
        band: Largest band; the largest whose past noise takes 256 MiB if None.

    Raises:
        TaskError: LF3308, the run has more steps than can be planned.
    """
    a_pass = math.ceil(rows / expected_batch)
    planned = rounds * ((epochs or 1) * a_pass if steps is None else steps)
    if planned > MOST_CORRELATED_STEPS:
        raise _too_many(f"{planned:,} steps with correlated noise", MOST_CORRELATED_STEPS)
    return FixedOrder.of(rows, expected_batch, planned, band or largest_band(size))


def plan_for(
    sampler: Sampler, steps: int, rounds: int, *, epsilon: float, delta: float
) -> NoisePlan:
    """Turn a target epsilon for a whole run into the noise of each step.

    Args:
        sampler: Draws the batches.
        steps: Steps of a round.
        rounds: Rounds of the run; a site is charged as if it took part in all.
        epsilon: Target for the whole run.
        delta: Delta of the guarantee.

    Raises:
        TaskError: Delta is not below 1 / rows, the run has more steps than can be accounted, or no
            noise reaches the target.
        RunError: LF3310, the accountants contradict each other.
    """
    rows = sampler.rows
    require_delta(delta, rows)
    if rounds * steps > _MOST_STEPS:
        raise _too_many(f"{rounds} rounds of {steps} steps", _MOST_STEPS)
    noise = noise_multiplier_for(epsilon, delta, sampler.event(1.0, steps).times(rounds))
    guarantee_of([sampler.event(noise, steps).times(rounds)], delta)  # cross-checked
    return NoisePlan(sampler, steps, noise)


def _too_many(what: str, most: int) -> TaskError:
    return TaskError(
        Problem(
            "LF3308",
            f"{what} are more than the {most:,} that can be accounted",
            key="rounds.count",
            remedy="fewer rounds, fewer epochs or larger batches",
        )
    )


def require_delta(delta: float, rows: int) -> None:
    """Refuse a delta that would allow one of the rows to be published whole.

    Args:
        delta: Delta of the guarantee.
        rows: Rows of the site.

    Raises:
        TaskError: LF3307, it is not below 1 / rows.
    """
    if delta >= 1.0 / rows:
        raise TaskError(
            Problem(
                "LF3307",
                f"delta {delta:g} is not below 1/{rows}: with {rows} rows it would allow "
                "one of them to be published whole",
                key="privacy.record.delta",
                remedy=f"a delta well below {1.0 / rows:.1g}",
            )
        )


def epsilon_curve(plan: NoisePlan, rounds: int, delta: float) -> list[tuple[int, float]]:
    """Return some rounds, the last among them, and the epsilon that a site has spent by then.

    Args:
        plan: Sampling and noise.
        rounds: Rounds of the run.
        delta: Delta of the guarantee.
    """
    shown = {step * 10**power for power in range(len(str(rounds))) for step in _CURVE}
    return [
        (number, epsilon_of([plan.round_event.times(number)], delta))
        for number in sorted({rounds, *(number for number in shown if number < rounds)})
    ]


def better_plans(
    plan: NoisePlan, rounds: int, *, epsilon: float, delta: float
) -> Sequence[NoisePlan]:
    """Return schedules of the same epsilon that lose less to the noise, the best first.

    They have larger batches, more steps, and more noise in each: what was best for small data sets
    of all that was tried. They take more computing.

    Args:
        plan: The schedule that is there.
        rounds: Rounds of the run.
        epsilon: Target for the whole run.
        delta: Delta of the guarantee.
    """
    found: list[NoisePlan] = []
    if isinstance(plan.sampler, FixedOrder):
        return found  # it is for sites that cannot draw what is suggested
    for rate, total in _SUGGESTED:
        batch = max(1, round(max(rate, plan.sampler.rate) * plan.sampler.rows))
        steps = max(plan.steps, math.ceil(total / rounds))
        sampler = PoissonSampler(plan.sampler.rows, batch)
        try:
            other = plan_for(sampler, steps, rounds, epsilon=epsilon, delta=delta)
        except TaskError:  # its noise or its steps are beyond what can be planned
            continue
        if other.run_noise(rounds) < _BETTER * plan.run_noise(rounds):
            found.append(other)
    return sorted(set(found), key=lambda other: other.run_noise(rounds))

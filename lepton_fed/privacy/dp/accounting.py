"""What DP-SGD costs: privacy loss distributions over the events that were really run.

Accounting is by PLD (Koskela, Jälkö, Honkela, AISTATS 2020; Doroshenko et al., PoPETs 2022) as
Google's dp-accounting implements it, with pessimistic rounding: the number is never below the
truth. Adjacency is add-or-remove one record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lepton_fed.errors import Problem, TaskError

__all__ = [
    "ADJACENCY",
    "GRID",
    "LARGEST_NOISE",
    "SampledGaussian",
    "epsilon_of",
    "noise_multiplier_for",
]

ADJACENCY = "add-or-remove-one"
GRID = 1e-3
"""Grid of the discretised privacy loss; the result is an upper bound at every grid."""

_TOLERANCE = 1e-3  # relative, of the noise multiplier
LARGEST_NOISE = 1e4
"""The largest noise multiplier that is looked for."""


@dataclass(frozen=True)
class SampledGaussian:
    """Steps of DP-SGD as they were run: a Gaussian on a Poisson sample.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sampling_rate: Probability with which each record is in a step, in (0, 1].
        steps: Number of steps.

    Raises:
        ValueError: A number is out of range: fewer than no steps would give epsilon back.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 <= self.noise_multiplier < math.inf and 0 < self.sampling_rate <= 1):
            raise ValueError(f"no such mechanism: {self}")
        if self.steps < 0:
            raise ValueError(f"{self.steps} steps cannot have been run")


def epsilon_of(events: Iterable[SampledGaussian], delta: float) -> float:
    """Return the epsilon that all events together cost at ``delta``.

    Args:
        events: What was run, in any order.
        delta: Delta of the guarantee.

    Returns:
        Epsilon; 0 for no steps, infinity without noise.
    """
    merged: Counter[tuple[float, float]] = Counter()
    for event in events:
        merged[event.noise_multiplier, event.sampling_rate] += event.steps
    return _epsilon(tuple(sorted((key, steps) for key, steps in merged.items() if steps)), delta)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    if not events:
        return 0.0
    if any(noise <= 0 for (noise, _), _ in events):
        return math.inf
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=GRID)
    for (noise, rate), steps in events:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        event = gaussian if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier with which all steps cost at most ``epsilon``.

    Args:
        epsilon: Target for the whole run.
        delta: Delta of the guarantee.
        sampling_rate: Probability with which each record is in a step, in (0, 1].
        steps: Steps of the whole run.

    Returns:
        The noise multiplier, at most 0.1 % above the smallest one; never one that costs more.

    Raises:
        TaskError: No reasonable amount of noise reaches the target.
    """

    def cost(noise: float) -> float:
        return epsilon_of([SampledGaussian(noise, sampling_rate, steps)], delta)

    # By the central limit theorem less noise than this costs more, and little noise takes long to
    # account for: its losses are large.
    high = max(1.0, sampling_rate * math.sqrt(steps) / epsilon)
    while high <= LARGEST_NOISE and cost(high) > epsilon:
        high *= 2.0
    if high > LARGEST_NOISE:
        raise TaskError(
            Problem(
                "LF3301",
                f"{steps} steps at sampling rate {sampling_rate:g} cannot stay within "
                f"epsilon {epsilon:g} at delta {delta:g}",
                key="privacy.record.epsilon",
                remedy="fewer rounds or epochs, smaller batches, or a larger epsilon",
            )
        )
    low = high / 2.0
    while cost(low) <= epsilon and low > 1e-2:
        high, low = low, low / 2.0
    while high / low > 1.0 + _TOLERANCE:
        middle = math.sqrt(high * low)
        if cost(middle) > epsilon:
            low = middle
        else:
            high = middle
    return high

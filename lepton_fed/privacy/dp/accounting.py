"""What DP-SGD costs: privacy loss distributions over the events that were really run.

Accounting is by PLD (Koskela, Jälkö, Honkela, AISTATS 2020; Doroshenko et al., PoPETs 2022) as
Google's dp-accounting implements it, with pessimistic rounding: the number is never below the
truth. Adjacency is add-or-remove one record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from lepton_fed.errors import Problem, TaskError

__all__ = [
    "ADJACENCY",
    "GRID",
    "LARGEST_NOISE",
    "Event",
    "OrderedGaussian",
    "SampledGaussian",
    "epsilon_of",
    "event_of",
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

    sampler: ClassVar[str] = "poisson"
    adjacency: ClassVar[str] = "add-or-remove-one"

    def __post_init__(self) -> None:
        _check_numbers(self)

    def record(self) -> dict[str, str | int | float]:
        """Return the event as plain JSON; :func:`event_of` reads it back."""
        return _record(self)

    def parts(self) -> tuple[float, float, int]:
        """Return noise multiplier, sampling rate and times of the Gaussians to account for."""
        return self.noise_multiplier, self.sampling_rate, self.steps


@dataclass(frozen=True)
class OrderedGaussian:
    """Steps of DP-SGD on batches that were cut from an order of all rows.

    A record is in one batch of a pass, whichever it is. Whoever is told which one sees a Gaussian
    once a pass and, in the other batches, nothing that depends on the record; being told less never
    costs more (the privacy loss is jointly quasi-convex in the two neighbours). So one un-amplified
    Gaussian a pass bounds both orders: L. Chua et al.: How Private are DP-SGD Implementations?
    ICML 2024, arXiv:2403.17673, section 3.

    The neighbour has the record's place empty: were the place gone too, the rows behind it would
    move up into other batches.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sampling_rate: Batch over rows, in (0, 1]; told, never credited.
        steps: Number of steps.
        passes: Most steps that one record is in; at most ``steps``.
        sampler: ``shuffled`` (an order for each pass) or ``full`` (always the same one).

    Raises:
        ValueError: A number is out of range, or there is no such sampler.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    passes: int
    sampler: str

    adjacency: ClassVar[str] = "zero-out-one"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not min(1, self.steps) <= self.passes <= self.steps:
            raise ValueError(f"{self.steps} steps cannot take {self.passes} passes")
        if self.sampler not in ("shuffled", "full"):
            raise ValueError(f"no such order: {self.sampler!r}")

    def record(self) -> dict[str, str | int | float]:
        """Return the event as plain JSON; :func:`event_of` reads it back."""
        return {**_record(self), "passes": self.passes}

    def parts(self) -> tuple[float, float, int]:
        """Return noise multiplier, sampling rate and times of the Gaussians to account for."""
        return self.noise_multiplier, 1.0, self.passes


Event = SampledGaussian | OrderedGaussian
"""What a sampler did, as it is charged."""


def _check_numbers(event: Event) -> None:
    if not (0 <= event.noise_multiplier < math.inf and 0 < event.sampling_rate <= 1):
        raise ValueError(f"no such mechanism: {event}")
    if event.steps < 0:
        raise ValueError(f"{event.steps} steps cannot have been run")


def _record(event: Event) -> dict[str, str | int | float]:
    return {
        "adjacency": event.adjacency,
        "noise_multiplier": event.noise_multiplier,
        "sampler": event.sampler,
        "sampling_rate": event.sampling_rate,
        "steps": event.steps,
    }


def event_of(record: Mapping[str, Any]) -> Event:
    """Return the event that ``record()`` wrote down.

    Args:
        record: Exactly the fields of an event.

    Raises:
        ValueError: A field is missing, one too many, of another type or out of range.

    Example:
        >>> event = SampledGaussian(1.1, 0.01, 100)
        >>> event_of(event.record()) == event
        True
    """
    try:
        noise, rate, steps = (record[key] for key in ("noise_multiplier", "sampling_rate", "steps"))
        counts = [steps, *([record["passes"]] if "passes" in record else [])]
        if any(type(count) is not int for count in counts):
            raise TypeError("a count is no whole number")
        if any(type(number) not in (int, float) for number in (noise, rate)):
            raise TypeError("a rate or noise multiplier is no number")
        event: Event = (
            OrderedGaussian(float(noise), float(rate), steps, counts[1], record["sampler"])
            if "passes" in record
            else SampledGaussian(float(noise), float(rate), steps)
        )
        whole = event.record() == dict(record)
    except (ArithmeticError, KeyError, TypeError) as error:
        raise ValueError(f"not the record of an event: {error}") from error
    if not whole:
        raise ValueError("not the record of an event: its fields do not go together")
    return event


def epsilon_of(events: Iterable[Event], delta: float) -> float:
    """Return the epsilon that all events together cost at ``delta``.

    Args:
        events: What was run, in any order.
        delta: Delta of the guarantee.

    Returns:
        Epsilon; 0 for no steps, infinity without noise.
    """
    merged: Counter[tuple[float, float]] = Counter()
    for event in events:
        noise, rate, times = event.parts()
        merged[noise, rate] += times
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

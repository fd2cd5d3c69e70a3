"""What a site's steps were, as they are charged: written into the ledger, and read back.

What they cost together is :mod:`lepton_fed.privacy.dp.accounting`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from lepton_fed.privacy.factorisation.toeplitz import moved_squares, square_root

__all__ = [
    "ADJACENCY",
    "MOST_CORRELATED_STEPS",
    "ROUNDED",
    "ZERO_OUT",
    "CorrelatedGaussian",
    "Event",
    "OrderedGaussian",
    "SampledGaussian",
    "charged_steps",
    "event_of",
]

ADJACENCY = "add-or-remove-one"
ZERO_OUT = "zero-out-one"

MOST_CORRELATED_STEPS = 100_000
"""Most steps of a training with correlated noise: more would take too long to plan."""

ROUNDED = 1.0 - 2.0**-50
"""Less than what a square root and a division make of a number: noise is never rounded up."""

_NO_NOISE = 1e-6
_EXACT = 2.0**40  # sums of whole numbers of these parts are exact, in any order


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
    adjacency: ClassVar[str] = ADJACENCY
    mechanism: ClassVar[str] = "dp_sgd"

    def __post_init__(self) -> None:
        _check_numbers(self)

    def record(self) -> dict[str, str | int | float]:
        """Return the event as plain JSON; :func:`event_of` reads it back."""
        return _record(self)

    def times(self, rounds: int) -> SampledGaussian:
        """Return what as many rounds of it are."""
        return replace(self, steps=rounds * self.steps)

    def after(self, charged: Iterable[Event]) -> SampledGaussian:
        """Return what a round costs after others: as much as ever."""
        del charged
        return self

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

    adjacency: ClassVar[str] = ZERO_OUT
    mechanism: ClassVar[str] = "dp_sgd"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not min(1, self.steps) <= self.passes <= self.steps:
            raise ValueError(f"{self.steps} steps cannot take {self.passes} passes")
        if self.sampler not in ("shuffled", "full"):
            raise ValueError(f"no such order: {self.sampler!r}")

    def record(self) -> dict[str, str | int | float]:
        """Return the event as plain JSON; :func:`event_of` reads it back."""
        return {**_record(self), "passes": self.passes}

    def times(self, rounds: int) -> OrderedGaussian:
        """Return what as many rounds of it are; each begins with a pass of its own."""
        return replace(self, steps=rounds * self.steps, passes=rounds * self.passes)

    def after(self, charged: Iterable[Event]) -> OrderedGaussian:
        """Return what a round costs after others: as much as ever."""
        del charged
        return self

    def parts(self) -> tuple[float, float, int]:
        """Return noise multiplier, sampling rate and times of the Gaussians to account for."""
        return self.noise_multiplier, 1.0, self.passes


@dataclass(frozen=True)
class CorrelatedGaussian:
    """Steps of DP-FTRL: what they add to the cost of the steps before them.

    A training of ``planned`` steps with the banded factorisation ``C`` releases ``C g + z``, where
    ``z`` is Gaussian of deviation ``noise_multiplier * s * clip`` and ``s`` is the sensitivity of
    all rows of ``C`` (:mod:`lepton_fed.privacy.factorisation.toeplitz`). Let ``s_t`` be that of
    the first ``t`` rows.

    - What leaves with the first ``t`` steps is made of the first ``t`` rows, because ``C`` is lower
      triangular. So they cost what one Gaussian of noise multiplier ``noise_multiplier * s / s_t``
      costs. That gradients depend on what was released before changes nothing: Denisov et al.,
      NeurIPS 2022, arXiv:2202.08312, theorem 2.1.
    - ``s_t`` does not decrease: one more row adds the square of what a unit moves there, and the
      pattern that moves the rows most is the same for each ``t`` (from the first step on).
    - Gaussians compose to a Gaussian whose inverse squared multiplier is the sum of theirs. So
      steps ``t1`` to ``t2`` are charged a Gaussian with ``(s_t2**2 - s_t1**2) / (noise_multiplier
      * s)**2``: then *all that is charged up to any step* costs what the first so many steps do,
      and at the end the whole, ``noise_multiplier**-2``. It is the sum that bounds a record's cost;
      by itself such a part may be less than what these steps tell of a record that came late,
      which paid for less before.

    The squares are rounded up to whole parts of 2**-40, so that the sum of the parts is the whole
    to the last bit.

    Args:
        noise_multiplier: Deviation of ``z`` over the sensitivity of all that is planned.
        sampling_rate: Batch over rows, in (0, 1]; told, never credited.
        steps: Number of steps; 0 where what is done again was charged already, and did not leave.
        first: Steps of this training before them.
        planned: Steps of the whole training, for which the noise was made.
        separation: Steps of a pass: a record comes back after so many.
        band: Coefficients of the factorisation.

    Raises:
        ValueError: A number is out of range.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    first: int
    planned: int
    separation: int
    band: int

    sampler: ClassVar[str] = "full"
    adjacency: ClassVar[str] = ZERO_OUT
    mechanism: ClassVar[str] = "dp_ftrl"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not (
            1 <= self.band <= self.planned <= MOST_CORRELATED_STEPS
            and self.separation >= 1
            and self.first >= 0
            and self.first + self.steps <= self.planned
        ):
            raise ValueError(f"no such steps of such a training: {self}")

    @property
    def end(self) -> int:
        """Return the steps of the training up to here."""
        return self.first + self.steps

    def record(self) -> dict[str, str | int | float]:
        """Return the event as plain JSON; :func:`event_of` reads it back."""
        return {
            **_record(self),
            "band": self.band,
            "first": self.first,
            "mechanism": self.mechanism,
            "planned": self.planned,
            "separation": self.separation,
        }

    def times(self, rounds: int) -> CorrelatedGaussian:
        """Return what as many rounds of it are, one after another; at most all that is planned."""
        return replace(self, steps=min(rounds * self.steps, self.planned - self.first))

    def after(self, charged: Iterable[Event]) -> CorrelatedGaussian:
        """Return what a round costs after others of this training.

        Args:
            charged: What the run was charged.
        """
        first = charged_steps(charged, self)
        return replace(self, first=first, steps=min(self.steps, self.planned - first))

    def parts(self) -> tuple[float, float, int]:
        """Return noise multiplier, sampling rate and times of the Gaussian to account for."""
        squares = self.inverse_square
        if not squares > 0:
            return math.inf, 1.0, 0
        return ROUNDED / math.sqrt(squares), 1.0, 1

    @property
    def inverse_square(self) -> float:
        """Return one over the squared noise multiplier of the Gaussian to account for."""
        if self.noise_multiplier < _NO_NOISE:
            return math.inf if self.steps else 0.0
        squares = _prefix_squares(self.band, self.planned, self.separation)
        whole = float(squares[-1]) * self.noise_multiplier**2
        before, after = (
            math.ceil(float(squares[step]) / whole * _EXACT) / _EXACT
            for step in (self.first, self.end)
        )
        return after - before


def charged_steps(charged: Iterable[Event], of: CorrelatedGaussian) -> int:
    """Return how many first steps of a training with correlated noise were charged.

    A charge of another plan, made before the rows changed, does not count: what its steps cost may
    be less than what as many of these cost.

    Args:
        charged: What its run was charged.
        of: Any steps of the training.
    """
    plan = replace(of, first=0, steps=0)
    ends = [
        event.end
        for event in charged
        if isinstance(event, CorrelatedGaussian) and replace(event, first=0, steps=0) == plan
    ]
    return max(ends, default=0)


@lru_cache(maxsize=64)
def _prefix_squares(band: int, planned: int, separation: int) -> Any:
    """Return the squared sensitivity of each number of first steps, ``[planned + 1]`` float64."""
    participations = -(-planned // separation)
    return moved_squares(square_root(band), planned, participations, separation)


Event = SampledGaussian | OrderedGaussian | CorrelatedGaussian
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


_OF_A_TRAINING = ("first", "planned", "separation", "band")


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
        extra = ("passes", *_OF_A_TRAINING)
        counts = [steps, *(record[key] for key in extra if key in record)]
        if any(type(count) is not int for count in counts):
            raise TypeError("a count is no whole number")
        if any(type(number) not in (int, float) for number in (noise, rate)):
            raise TypeError("a rate or noise multiplier is no number")
        event: Event
        if "mechanism" in record:
            training = [record[key] for key in _OF_A_TRAINING]
            event = CorrelatedGaussian(float(noise), float(rate), steps, *training)
        elif "passes" in record:
            passes = record["passes"]
            event = OrderedGaussian(float(noise), float(rate), steps, passes, record["sampler"])
        else:
            event = SampledGaussian(float(noise), float(rate), steps)
        whole = event.record() == dict(record)
    except (ArithmeticError, KeyError, TypeError) as error:
        raise ValueError(f"not the record of an event: {error}") from error
    if not whole:
        raise ValueError("not the record of an event: its fields do not go together")
    return event

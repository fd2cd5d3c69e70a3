"""DP-FTRL with a banded factorisation: who takes part when, what it costs, how much noise.

All steps together are one Gaussian mechanism, whose sensitivity is known from the pattern in which
a record takes part; nothing depends on chance. So batches may be read in a fixed order, which is
what a site can do that cannot promise Poisson sampling, and no amplification is claimed.

Neighbours differ by one record being replaced by one that contributes nothing (zero-out-one): the
place of a record in the order, and the number of records, are public.

References:
    P. Kairouz, B. McMahan, S. Song, O. Thakkar, A. Thakurta, Z. Xu, "Practical and Private (Deep)
    Learning without Sampling or Shuffling", ICML 2021, arXiv:2103.00039.
    For the factorisation see :mod:`lepton_fed.privacy.factorisation.toeplitz`, for what steps cost
    :class:`lepton_fed.privacy.dp.events.CorrelatedGaussian`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.events import CorrelatedGaussian
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.privacy.factorisation.toeplitz import (
    best_band,
    inverse,
    prefix_error,
    sensitivity,
    square_root,
    step_deviation,
)

__all__ = ["BandedMechanism", "FixedOrder", "largest_band"]

_MEMORY = 256 << 20  # of past noise: what a laptop spares
_NUMBER_BYTES = 4


def largest_band(size: int) -> int:
    """Return the largest band whose past noise takes at most 256 MiB.

    Args:
        size: Coordinates of a gradient.
    """
    return 1 + _MEMORY // (_NUMBER_BYTES * size)


@dataclass(frozen=True)
class FixedOrder:
    """Batches in one order that repeats, and goes on over the rounds.

    It is the sampling that DP-FTRL is accounted for: it draws the batches from where the training
    stands, and says what they cost.

    Args:
        rows: Number of records at the site.
        expected_batch: Records in a step; the last step of a pass may have fewer.
        planned: Steps of the whole training.
        band: Coefficients of the factorisation.
        first: Steps of the training that are done.

    Raises:
        ValueError: A number is out of range.

    Privacy:
        The number of records, and which batch each is in, are treated as public.
    """

    rows: int
    expected_batch: int
    planned: int
    band: int
    first: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.expected_batch < 1:
            raise ValueError(f"{self.rows} rows in batches of {self.expected_batch}")
        if not 0 <= self.first <= self.planned:
            raise ValueError(f"step {self.first} of {self.planned}")
        self.mechanism  # noqa: B018 - refuses what is out of range

    @classmethod
    def of(cls, rows: int, expected_batch: int, planned: int, most_band: int) -> FixedOrder:
        """Return the order with the band that has the least error.

        Args:
            rows: Number of records at the site.
            expected_batch: Records in a step.
            planned: Steps of the whole training.
            most_band: Largest band, for memory and disk.
        """
        separation = -(-rows // expected_batch)
        return cls(rows, expected_batch, planned, _best_band(planned, separation, most_band))

    @property
    def rate(self) -> float:
        """Return the share of the records that is in a step; nothing is made of it."""
        return min(1.0, self.expected_batch / self.rows)

    @property
    def divisor(self) -> int:
        """Return the public number that a step's sum is divided by."""
        return min(self.expected_batch, self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of a pass over all records."""
        return -(-self.rows // self.expected_batch)

    @cached_property
    def mechanism(self) -> BandedMechanism:
        """Return the mechanism of the whole training."""
        separation = self.steps_per_epoch
        participations = -(-self.planned // separation)
        return BandedMechanism(self.planned, participations, separation, self.band)

    def past_bytes(self, size: int) -> int:
        """Return what the noise takes, in memory and on disk, that later steps take back.

        Args:
            size: Coordinates of a gradient.
        """
        return (self.band - 1) * _NUMBER_BYTES * size

    def at(self, step: int) -> FixedOrder:
        """Return the order where the training stands after so many steps."""
        return replace(self, first=step)

    def batches(self, steps: int, entropy: Entropy) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the row numbers of each step; each row comes back after exactly one pass.

        Args:
            steps: Number of steps.
            entropy: Is not drawn from.
        """
        del entropy
        for step in range(self.first, self.first + steps):
            start = step % self.steps_per_epoch * self.expected_batch
            yield np.arange(start, min(start + self.expected_batch, self.rows), dtype=np.int64)

    def event(self, noise_multiplier: float, steps: int) -> CorrelatedGaussian:
        """Return what the next ``steps`` add to what the training has cost.

        Args:
            noise_multiplier: Deviation of the noise over the sensitivity of the whole.
            steps: Number of steps.

        Raises:
            ValueError: They are more than were planned.
        """
        return CorrelatedGaussian(
            noise_multiplier,
            self.rate,
            steps,
            self.first,
            self.planned,
            self.steps_per_epoch,
            self.band,
        )


@lru_cache(maxsize=256)
def _best_band(planned: int, separation: int, most: int) -> int:
    return best_band(planned, -(-planned // separation), separation, most)


@dataclass(frozen=True)
class BandedMechanism:
    """A whole training with correlated noise.

    Args:
        steps: Steps of the whole training.
        participations: Steps that a record takes part in, at most.
        separation: Steps from one to the next, at least.
        band: Coefficients of the factorisation; 1 is independent noise, DP-SGD.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int
    participations: int
    separation: int
    band: int

    def __post_init__(self) -> None:
        if self.band > self.steps:
            raise ValueError(f"a band of {self.band} over {self.steps} steps")
        self.sensitivity  # noqa: B018 - refuses what is out of range

    @cached_property
    def sensitivity(self) -> float:
        """Return by how much a record with gradients of norm 1 moves all that is released."""
        return sensitivity(square_root(self.band), self.steps, self.participations, self.separation)

    @property
    def error(self) -> float:
        """Return the error of the prefix sums for noise multiplier 1 and clipping norm 1."""
        return prefix_error(
            square_root(self.band), self.steps, self.participations, self.separation
        )

    @property
    def step_deviation(self) -> float:
        """Return the deviation of a step's noise for noise multiplier and clipping norm 1.

        It is the last step's, which is the largest.
        """
        return self.sensitivity * step_deviation(square_root(self.band), self.steps)

    @property
    def sum_deviation(self) -> float:
        """Return the deviation of the sum of all steps' noise, for the same."""
        prefix = np.cumsum(inverse(square_root(self.band), self.steps))
        return self.sensitivity * float(np.linalg.norm(prefix))

    @property
    def independent_error(self) -> float:
        """Return the error that independent noise of the same cost has in the prefix sums."""
        return math.sqrt(self.participations * (self.steps + 1) / 2)

    def noise(
        self,
        size: int,
        clip: float,
        noise_multiplier: float,
        entropy: Entropy,
        past: tuple[int, npt.NDArray[np.float32]] | None = None,
    ) -> CorrelatedNoise:
        """Return the stream of noise for sums of clipped gradients.

        Args:
            size: Coordinates of a gradient.
            clip: Largest norm of a record's gradient.
            noise_multiplier: Deviation of the noise over the sensitivity.
            entropy: The owner's own, from the operating system.
            past: What the stream said of itself when training stopped; nothing at the start.

        Raises:
            ValueError: A number is out of range, or the past is that of another stream.
        """
        deviation = noise_multiplier * self.sensitivity * clip
        return CorrelatedNoise(square_root(self.band), size, deviation, self.steps, entropy, past)

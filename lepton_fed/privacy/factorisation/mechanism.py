"""DP-FTRL with a banded factorisation: who takes part when, what it costs, how much noise.

All steps together are one Gaussian mechanism, whose sensitivity is known from the pattern in which
a record takes part; nothing depends on chance. So batches may be read in a fixed order, which is
what a site can do that cannot promise Poisson sampling, and no amplification is claimed.

Neighbours differ by one record being replaced by one that contributes nothing (zero-out-one): the
place of a record in the order, and the number of records, are public.

References:
    P. Kairouz, B. McMahan, S. Song, O. Thakkar, A. Thakurta, Z. Xu, "Practical and Private (Deep)
    Learning without Sampling or Shuffling", ICML 2021, arXiv:2103.00039.
    For the factorisation see :mod:`lepton_fed.privacy.factorisation.toeplitz`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.privacy.factorisation.toeplitz import (
    best_band,
    prefix_error,
    sensitivity,
    square_root,
)

__all__ = ["ADJACENCY", "BandedMechanism", "FixedOrder"]

ADJACENCY = "zero-out-one"


@dataclass(frozen=True)
class FixedOrder:
    """Batches in one order that repeats: the sampling that DP-FTRL is accounted for.

    Args:
        rows: Number of records at the site.
        batch: Records in a step; the last step of a pass may have fewer.

    Raises:
        ValueError: A number is not positive.
    """

    rows: int
    batch: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch < 1:
            raise ValueError(f"{self.rows} rows in batches of {self.batch}")

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of a pass over all records."""
        return -(-self.rows // self.batch)

    def batches(self, steps: int, first: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the row numbers of each step; each row comes back after exactly one pass.

        Args:
            steps: Number of steps.
            first: Number of the first step, where training goes on.
        """
        for step in range(first, first + steps):
            start = step % self.steps_per_epoch * self.batch
            yield np.arange(start, min(start + self.batch, self.rows), dtype=np.int64)

    def mechanism(self, steps: int, most_band: int = 0) -> BandedMechanism:
        """Return the mechanism for so many steps of this order, with the best band.

        Args:
            steps: Of the whole training.
            most_band: Largest band, for memory; 0 for any.
        """
        separation = self.steps_per_epoch
        participations = -(-steps // separation)
        band = best_band(steps, participations, separation, most_band)
        return BandedMechanism(steps, participations, separation, band)


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

    def event(self, noise_multiplier: float) -> SampledGaussian:
        """Return what the whole training costs: one Gaussian, without amplification.

        Args:
            noise_multiplier: Deviation of the noise over the sensitivity. Multipliers of trainings
                with other bands compare: the same one costs the same.
        """
        return SampledGaussian(noise_multiplier, 1.0, 1)

    def noise(
        self, size: int, clip: float, noise_multiplier: float, entropy: Entropy
    ) -> CorrelatedNoise:
        """Return the stream of noise for sums of clipped gradients.

        Args:
            size: Coordinates of a gradient.
            clip: Largest norm of a record's gradient.
            noise_multiplier: Deviation of the noise over the sensitivity.
            entropy: The owner's own, from the operating system.

        Raises:
            ValueError: A number is out of range.
        """
        deviation = noise_multiplier * self.sensitivity * clip
        return CorrelatedNoise(square_root(self.band), size, deviation, self.steps, entropy)

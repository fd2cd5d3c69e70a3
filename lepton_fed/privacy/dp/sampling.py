"""The sampler that runs is the one that is accounted: it draws the batches and emits the event."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.accounting import OrderedGaussian, SampledGaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.factorisation.mechanism import FixedOrder

__all__ = ["SAMPLERS", "OrderedSampler", "PoissonSampler", "Sampler", "sampler_of"]

SAMPLERS = ("poisson", "shuffled", "full")
"""Words of ``privacy.record.sampler``."""


@dataclass(frozen=True)
class PoissonSampler:
    """Each record is in each step independently with the same probability.

    Args:
        rows: Number of records at the site.
        expected_batch: Expected records in a step; at most ``rows``.
        given_rate: The probability itself, a public number; made of the other two when None.

    Privacy:
        Without it the number of records is treated as public: the sampling rate is made from it.
    """

    rows: int
    expected_batch: int
    given_rate: float | None = None

    @property
    def rate(self) -> float:
        """Return the probability with which a record is in a step."""
        if self.given_rate is not None:
            return self.given_rate
        return min(1.0, self.expected_batch / self.rows)

    @property
    def divisor(self) -> int:
        """Return the public number that a step's sum is divided by."""
        return self.expected_batch if self.given_rate else min(self.expected_batch, self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps in which each record is expected once."""
        return max(1, round(1.0 / self.rate))

    def batches(self, steps: int, entropy: Entropy) -> Iterator[npt.NDArray[np.int64]]:
        """Draw the row numbers of each step; a step may be empty.

        Args:
            steps: Number of steps.
            entropy: The site's own; never a seeded generator.
        """
        for _ in range(steps):
            yield np.flatnonzero(entropy.uniform(self.rows) < self.rate)

    def event(self, noise_multiplier: float, steps: int) -> SampledGaussian:
        """Return what ``steps`` of this sampler cost with Gaussian noise."""
        return SampledGaussian(noise_multiplier, self.rate, steps)


@dataclass(frozen=True)
class OrderedSampler:
    """Pass after pass over all records, in batches of one size; the last of a pass may be smaller.

    Args:
        rows: Number of records at the site.
        expected_batch: Records in a batch.
        order: ``shuffled``: each pass in an order of its own, drawn from the site's entropy;
            ``full``: always in the order of the rows.

    Privacy:
        The number of records, and with ``full`` which batch each is in, are treated as public.
    """

    rows: int
    expected_batch: int
    order: str

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
        """Return the steps of a pass."""
        return math.ceil(self.rows / self.expected_batch)

    def batches(self, steps: int, entropy: Entropy) -> Iterator[npt.NDArray[np.int64]]:
        """Draw the row numbers of each step, from the beginning of a pass.

        Args:
            steps: Number of steps.
            entropy: The site's own; never a seeded generator.
        """
        order = np.arange(self.rows)
        for step in range(steps):
            batch = step % self.steps_per_epoch
            if batch == 0 and self.order == "shuffled":
                order = entropy.permutation(self.rows)
            yield order[batch * self.expected_batch : (batch + 1) * self.expected_batch]

    def event(self, noise_multiplier: float, steps: int) -> OrderedGaussian:
        """Return what ``steps`` of this sampler cost with Gaussian noise: no sampling counts."""
        passes = math.ceil(steps / self.steps_per_epoch)
        return OrderedGaussian(noise_multiplier, self.rate, steps, passes, self.order)


Sampler = PoissonSampler | OrderedSampler | FixedOrder
"""Draws batches and says what they cost."""


def sampler_of(name: str, rows: int, expected_batch: int) -> PoissonSampler | OrderedSampler:
    """Return a sampler of DP-SGD.

    Args:
        name: One of :data:`SAMPLERS`.
        rows: Number of records at the site.
        expected_batch: Records that a step is expected to have.

    Example:
        >>> sampler_of("shuffled", 100, 30).event(1.0, 10).passes
        3
    """
    if name == "poisson":
        return PoissonSampler(rows, expected_batch)
    return OrderedSampler(rows, expected_batch, name)

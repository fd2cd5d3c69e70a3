"""The sampler that runs is the one that is accounted: it draws the batches and emits the event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["PoissonSampler"]


@dataclass(frozen=True)
class PoissonSampler:
    """Each record is in each step independently with the same probability.

    Args:
        rows: Number of records at the site.
        expected_batch: Expected records in a step; at most ``rows``.

    Privacy:
        The number of records is treated as public: the sampling rate is made from it.
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

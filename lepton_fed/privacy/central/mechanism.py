"""DP-FedAvg with a trusted coordinator: clip updates, add noise to the sum, divide by a constant.

An update is clipped to ``C``, put on an integer grid and summed exactly; the coordinator adds
discrete Gaussian noise on the same grid. What leaves the coordinator is the noised sum alone,
divided by a public number. Where secure aggregation made the sum, the sites clipped their updates
and the grid is that of its ring.

Who takes part may be public: then neighbours differ by one site's update, zero in one of them
(zero-out-one-site), and the sum is divided by how many came. Or a round takes each site with
probability ``q``, independently and in secret: then neighbours differ by the presence of one site
(add-or-remove-one-site), and the sum is divided by ``q n``.

What it costs is accounted for as a continuous Gaussian: with a sigma of a billion units of the grid
the discrete one is post-processing of it but for less than 1e-18 of its variance
(:mod:`lepton_fed.privacy.distributed.accounting`, b).

The protected unit is a site's whole update. The coordinator sees updates or their sum without
noise; against it this protects nothing.

With fewer than some hundreds of sites the noise swamps the mean: in each coordinate its deviation
is ``z C / n``.

References:
    H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, "Learning Differentially Private Recurrent
    Language Models", ICLR 2018, arXiv:1710.06963, algorithm 1 (fixed-denominator estimator).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.central.clipping import AdaptiveClip, FixedClip
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["ADJACENCY", "GRID_BITS", "CentralSum", "event", "sampled_sites"]

ADJACENCY = "add-or-remove-one-site"

Reals = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

GRID_BITS = 30
"""The clipping norm in units of the grid, as a power of two."""

_DISCRETE = 4.0  # units of variance, more than what a coarse grid costs (distributed.accounting, b)
_SLICE = 1 << 14


def event(noise_multiplier: float, sampling_rate: float, rounds: int) -> SampledGaussian:
    """Return what rounds cost: a Gaussian on a Poisson sample of the sites.

    Args:
        noise_multiplier: Of sum and count together.
        sampling_rate: Probability with which each site takes part in a round.
        rounds: How many.
    """
    return SampledGaussian(noise_multiplier, sampling_rate, rounds)


def sampled_sites(sites: int, rate: float, entropy: Entropy) -> npt.NDArray[np.int64]:
    """Draw the sites of a round, each independently; that is the sampling that is accounted for.

    Args:
        sites: How many there are.
        rate: Probability with which each takes part, in (0, 1].
        entropy: The coordinator's own; who was drawn has to stay secret.

    Returns:
        Their numbers from 0, ``[k]`` int64; none may be drawn.
    """
    return np.flatnonzero(entropy.uniform(sites) < rate)


@dataclass
class CentralSum:
    """The sum of one round.

    Args:
        size: Coordinates of an update.
        clip: This round's clipping norm.
        noise_multiplier: Of sum and count together.
        expected: Updates that are expected in a round, a public number: ``q n``.
        step: Distance of two neighbours of the grid; 0 for a ``2**-30`` of the clipping norm.

    Raises:
        ValueError: A number is out of range, or the count leaves no noise to the sum.
    """

    size: int
    clip: FixedClip | AdaptiveClip
    noise_multiplier: float
    expected: float
    step: float = 0.0
    updates: int = 0
    within: int = 0
    _total: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not (0 < self.expected < math.inf and 0 <= self.step < math.inf):
            raise ValueError(f"{self.size} coordinates, {self.expected} updates expected")
        if self.sigma >= 2.0**40:
            raise ValueError(f"a noise multiplier of {self.noise_multiplier}")
        self._total = np.zeros(self.size, dtype=np.int64)

    @property
    def grid(self) -> float:
        """Return the distance of two neighbours of the grid."""
        return self.step or math.ldexp(self.clip.norm, -GRID_BITS)

    @property
    def sigma(self) -> float:
        """Return the parameter of the noise, in units of the grid.

        Rounding to the nearest neighbour lengthens an update by half a unit in each coordinate at
        most; the noise is made for that.
        """
        longest = self.clip.norm / self.grid * (1 + 2.0**-20) + math.sqrt(self.size) / 2
        noise = self.clip.sum_noise_multiplier(self.noise_multiplier) * longest
        return math.sqrt(noise**2 + _DISCRETE)

    def add(self, update: Floats) -> None:
        """Clip an update and add it.

        Args:
            update: ``[size]`` floating point, finite.

        Raises:
            ValueError: Another shape, or something is not finite; the sum is as it was.
        """
        if update.shape != (self.size,):
            raise ValueError(f"an update of shape {update.shape}, not ({self.size},)")
        squares = 0.0
        for part in self._slices():
            wide = update[part].astype(np.float64)
            if not np.isfinite(wide).all():
                raise ValueError("an update that is not finite")
            squares += float(np.square(wide).sum())
        norm = math.sqrt(squares)
        factor = min(1.0, self.clip.norm / norm if norm > 0 else 1.0) / self.grid
        for part in self._slices():
            self._total[part] += np.rint(update[part].astype(np.float64) * factor).astype(np.int64)
        self.updates += 1
        self.within += norm <= self.clip.norm

    def add_sum(self, units: npt.NDArray[np.int64], updates: int) -> None:
        """Add a sum of updates that were clipped and put on the grid where they come from.

        Args:
            units: ``[size]`` int64, in units of the grid.
            updates: How many are in it.

        Raises:
            ValueError: Another shape; the sum is as it was.
        """
        if units.shape != (self.size,):
            raise ValueError(f"a sum of shape {units.shape}, not ({self.size},)")
        self._total += units
        self.updates += updates

    def released_sum(self, entropy: Entropy) -> Reals:
        """Return the noised sum, ``[size]`` float64; it is empty then.

        Args:
            entropy: The coordinator's own, from its operating system.
        """
        self._total += discrete_gaussian(self.sigma, self.size, entropy)
        noised: Reals = self._total.astype(np.float64) * self.grid
        self._total[:] = 0
        self.updates = self.within = 0
        return noised

    def release(self, entropy: Entropy) -> tuple[Reals, FixedClip | AdaptiveClip]:
        """Return the noised mean and the next round's norm; the sum is empty then.

        Args:
            entropy: The coordinator's own, from its operating system.

        Returns:
            ``[size]`` float64, and a clip for the next round. Nothing else of the round may be
            shown: not the number of updates, not their norms.
        """
        following = self.clip.step(self.within, self.updates, entropy)
        return self.released_sum(entropy) / self.expected, following

    def _slices(self) -> list[slice]:
        return [slice(at, min(at + _SLICE, self.size)) for at in range(0, self.size, _SLICE)]

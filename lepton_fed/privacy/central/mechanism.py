"""DP-FedAvg with a trusted coordinator: clip updates, add noise to the sum.

An update is clipped to ``C``, put on an integer grid and summed exactly; the coordinator adds
discrete Gaussian noise on the same grid. What leaves the coordinator is the noised sum alone,
divided by a public number. Where secure aggregation made the sum, the sites clipped their updates
and the grid is that of its ring.

Who takes part is public: neighbours differ by one site's update, zero in one of them
(zero-out-one-site), and the sum is divided by how many came.

What it costs is accounted for as a continuous Gaussian: with a sigma of a billion units of the grid
the discrete one is post-processing of it but for less than 1e-18 of its variance
(:mod:`lepton_fed.privacy.distributed.accounting`, b).

The protected unit is a site's whole update. The coordinator sees updates or their sum without
noise; against it this protects nothing.

With fewer than some hundreds of sites the noise swamps the mean: in each coordinate its deviation
is ``z C / n``.

References:
    H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, "Learning Differentially Private Recurrent
    Language Models", ICLR 2018, arXiv:1710.06963, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lepton_fed.config.privacy_rules import LEAST_CLIP
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["GRID_BITS", "CentralSum"]

Reals = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

GRID_BITS = 30
"""The clipping norm in units of the grid, as a power of two."""

_DISCRETE = 4.0  # units of variance, more than what a coarse grid costs (distributed.accounting, b)
_SLICE = 1 << 14


@dataclass
class CentralSum:
    """The sum of one round.

    Args:
        size: Coordinates of an update.
        clip: Largest norm of one.
        noise_multiplier: Standard deviation of the noise over ``clip``.
        step: Distance of two neighbours of the grid; 0 for a ``2**-30`` of the clipping norm.

    Raises:
        ValueError: A number is out of range.
    """

    size: int
    clip: float
    noise_multiplier: float
    step: float = 0.0
    updates: int = 0
    _total: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not (LEAST_CLIP <= self.clip < math.inf and 0 <= self.step < math.inf):
            raise ValueError(f"{self.size} coordinates, clip {self.clip}, step {self.step}")
        if not 0 < self.sigma < 2.0**40:
            raise ValueError(f"a noise multiplier of {self.noise_multiplier}")
        self._total = np.zeros(self.size, dtype=np.int64)

    @property
    def grid(self) -> float:
        """Return the distance of two neighbours of the grid."""
        return self.step or math.ldexp(self.clip, -GRID_BITS)

    @property
    def sigma(self) -> float:
        """Return the parameter of the noise, in units of the grid.

        Rounding to the nearest neighbour lengthens an update by half a unit in each coordinate at
        most; the noise is made for that.
        """
        longest = self.clip / self.grid * (1 + 2.0**-20) + math.sqrt(self.size) / 2
        return math.sqrt((self.noise_multiplier * longest) ** 2 + _DISCRETE)

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
        factor = min(1.0, self.clip / norm if norm > 0 else 1.0) / self.grid
        for part in self._slices():
            self._total[part] += np.rint(update[part].astype(np.float64) * factor).astype(np.int64)
        self.updates += 1

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
        self.updates = 0
        return noised

    def _slices(self) -> list[slice]:
        return [slice(at, min(at + _SLICE, self.size)) for at in range(0, self.size, _SLICE)]

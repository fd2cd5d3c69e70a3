"""What a site sends and what the coordinator makes of the sum.

    site         clip -> rotate -> divide by the grid -> round -> add a share of noise -> ring
    coordinator  ring -> nearest to zero -> times the grid -> rotate back

What the coordinator gets are whole numbers modulo ``2**bits``; with secure aggregation, only their
sum. Everything that it does with it is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.distributed.plan import SharesPlan
from lepton_fed.privacy.distributed.rotation import Rotation
from lepton_fed.privacy.distributed.rounding import conditionally_rounded
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.skellam import skellam

__all__ = ["NoisySum"]

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
Ring = npt.NDArray[np.uint64]

_LARGEST_UPDATE = 1e100  # of a coordinate, so that squares do not overflow


@dataclass(frozen=True)
class NoisySum:
    """The two ends of one round's sum.

    Args:
        plan: What all parties agreed on.
        rotation: The round's.

    Raises:
        ValueError: The rotation is one of another size.
    """

    plan: SharesPlan
    rotation: Rotation

    def __post_init__(self) -> None:
        if self.rotation.size != self.plan.size:
            raise ValueError(f"a rotation of {self.rotation.size}, not {self.plan.size}")

    def encode(self, update: npt.NDArray[np.floating], entropy: Entropy) -> Ring:
        """Return what a site sends: its update and its share of the noise.

        Args:
            update: ``[size]`` floating point, finite; it is clipped here.
            entropy: The site's own, from its operating system.

        Returns:
            ``[padded]`` uint64 below ``2**bits``.

        Raises:
            ValueError: Another shape, or something is not finite or far beyond the grid.
        """
        return self.to_ring(self.quantised(update, entropy) + self.share(entropy))

    def quantised(self, update: npt.NDArray[np.floating], entropy: Entropy) -> Integers:
        """Return an update on the grid, without noise: not to be released.

        Args:
            update: ``[size]`` floating point, finite.
            entropy: The site's own.

        Returns:
            ``[padded]`` int64, in units of the grid.

        Raises:
            ValueError: Another shape, or something is not finite or far beyond the grid.
        """
        # As a Python number: in float32 the bound would be infinite. NaN compares false.
        if not float(np.abs(update).max(initial=0.0)) <= _LARGEST_UPDATE:
            raise ValueError(f"an update that is not finite, or beyond {_LARGEST_UPDATE:g}")
        units = self.rotation.apply(update)
        norm = math.sqrt(float(units @ units))
        units *= min(1.0, self.plan.clip / norm if norm > 0 else 1.0) / self.plan.grid
        return conditionally_rounded(units, self.plan.norm_limit, entropy)

    def share(self, entropy: Entropy) -> Integers:
        """Return a site's share of the noise, ``[padded]`` int64 in units of the grid."""
        plan = self.plan
        if plan.noise == "skellam":
            return skellam(plan.share_sigma**2, plan.padded, entropy)
        return discrete_gaussian(plan.share_sigma, plan.padded, entropy)

    def to_ring(self, units: Integers) -> Ring:
        """Return integers modulo ``2**bits``, uint64 of the same shape."""
        return units.view(np.uint64) & self._mask

    def from_ring(self, total: Ring) -> Integers:
        """Return the integers nearest to zero that ring elements stand for, int64.

        Args:
            total: Sums of ring elements, uint64 of any shape; bits above the ring are ignored.
        """
        shift = np.uint64(64 - self.plan.bits)
        signed: Integers = (total << shift).view(np.int64) >> np.int64(64 - self.plan.bits)
        return signed

    def decode(self, total: Ring) -> Reals:
        """Return the noisy sum of the updates.

        Args:
            total: ``[padded]`` uint64, the sum of what sites sent.

        Returns:
            ``[size]`` float64.

        Raises:
            ValueError: Another shape.
        """
        return self.rotation.undo(self.from_ring(total).astype(np.float64) * self.plan.grid)

    @property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << self.plan.bits) - 1)

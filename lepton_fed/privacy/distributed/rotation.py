"""A public random rotation: it spreads an update evenly over its coordinates.

Few large coordinates would force a coarse grid on all of them. After a Walsh-Hadamard transform
with random signs every coordinate of a block of ``B`` is about as large: in a sum of ``n`` updates
of norm ``C``, at most ``n C / sqrt(B)`` in standard deviation, whatever the updates are.

One transform over the whole update would pad it to a power of two, up to twice its length. Blocks
keep the padding within 5 % from 80 000 coordinates on, and a block stays in cache. The price: an
update that lies in one block is spread over ``B`` coordinates only, not over all of them. With
``B = 65536`` that is ``n C / 256``, little beside the noise of the sum.

References:
    P. Kairouz, Z. Liu, T. Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
    Learning with Secure Aggregation", ICML 2021, arXiv:2102.06387, section 4
    (randomised flattening).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.core.digests import digest_of
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["Rotation", "block_of"]

Reals = npt.NDArray[np.float64]

_LARGEST_BLOCK = 1 << 16  # half a megabyte of float64: it stays in cache
_SMALLEST_BLOCK = 1 << 12  # of updates that have more than one
_MOST_PADDING = 0.05


def block_of(size: int) -> int:
    """Return the length of a block for updates of this many coordinates, a power of two.

    Raises:
        ValueError: There are no coordinates.
    """
    if size < 1:
        raise ValueError(f"an update of {size} coordinates")
    whole = 1 << (size - 1).bit_length()
    if whole <= _SMALLEST_BLOCK:
        return whole
    block = min(whole, _LARGEST_BLOCK)
    while block > _SMALLEST_BLOCK and -size % block > _MOST_PADDING * size:
        block //= 2
    return block


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map, block by block: random signs, then a Walsh-Hadamard transform.

    Args:
        size: Coordinates of an update.
        key: 32 bytes that the signs come from. They are public: all parties have to know them.

    Privacy:
        The guarantee does not depend on the key. What depends on it is how often a sum wraps, so a
        site whose update was made against a known key only harms the accuracy.
    """

    size: int
    key: bytes

    @classmethod
    def of_round(cls, run_seed: int, round_number: int, size: int) -> Rotation:
        """Return the rotation that everybody derives for a round."""
        name = {"run": run_seed, "round": round_number, "purpose": "rotation"}
        return cls(size, bytes.fromhex(digest_of("lepton-fed rotation 1", name)))

    @property
    def block(self) -> int:
        """Return the length of a block."""
        return block_of(self.size)

    @property
    def padded(self) -> int:
        """Return the coordinates of a rotated update."""
        return self.size + -self.size % self.block

    def apply(self, update: npt.NDArray[np.floating]) -> Reals:
        """Return a rotated update.

        Args:
            update: ``[size]`` floating point, finite.

        Returns:
            ``[padded]`` float64, of the same norm.

        Raises:
            ValueError: The update has another shape.
        """
        if update.shape != (self.size,):
            raise ValueError(f"an update of shape {update.shape}, not ({self.size},)")
        rotated = np.zeros(self.padded)
        rotated[: self.size] = update
        signs = self._signs()
        for start in range(0, self.padded, self.block):
            part = rotated[start : start + self.block]
            part *= signs[start : start + self.block]
            part[:] = _walsh_hadamard(part)
        return rotated

    def undo(self, rotated: Reals) -> Reals:
        """Return the update that was rotated; linear, so sums of updates come back as well.

        Args:
            rotated: ``[padded]`` float64.

        Returns:
            ``[size]`` float64.

        Raises:
            ValueError: It has another shape.
        """
        if rotated.shape != (self.padded,):
            raise ValueError(f"a rotated update of shape {rotated.shape}, not ({self.padded},)")
        update = np.empty(self.padded)
        signs = self._signs()
        for start in range(0, self.padded, self.block):
            part = update[start : start + self.block]
            part[:] = _walsh_hadamard(rotated[start : start + self.block])
            part *= signs[start : start + self.block]
        return update[: self.size].copy()

    def _signs(self) -> npt.NDArray[np.int8]:
        words = Entropy(self.key).words(-(-self.padded // 64))
        bits = np.unpackbits(words.view(np.uint8))[: self.padded]
        return 1 - 2 * bits.astype(np.int8)


def _walsh_hadamard(values: Reals) -> Reals:
    """Return the normalised transform of ``[2**k]`` values.

    Written as ``H_r X H_c`` of the values as a matrix, so that both halves of the butterflies run
    along whole rows. Additions only and in a fixed order: the same bits on every machine.
    """
    size = values.size
    rows = 1 << ((size.bit_length() - 1) // 2)
    half = _butterflies(values.reshape(rows, size // rows).copy())
    whole = _butterflies(half.T.copy())
    result: Reals = whole.T.reshape(size) / math.sqrt(size)
    return result


def _butterflies(matrix: Reals) -> Reals:
    """Transform each column of ``[2**k, columns]``, in place."""
    rows, columns = matrix.shape
    stride = 1
    while stride < rows:
        pairs = matrix.reshape(rows // (2 * stride), 2, stride * columns)
        first, second = pairs[:, 0], pairs[:, 1]
        difference = first - second
        first += second
        second[:] = difference
        stride *= 2
    return matrix

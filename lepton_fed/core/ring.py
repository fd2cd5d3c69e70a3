"""Weighted sums in an integer ring: exact, hence the same in whatever order replies arrive.

Floating-point addition is not associative, so a float sum depends on who answered first. Here an
update ``x`` with weight ``w`` becomes integers modulo ``2**bits``::

    W = round(w / w_bound * 2**WEIGHT_BITS)                 the weight, quantised
    X = round(x * (W / 2**WEIGHT_BITS) * 2**fraction_bits)  the weighted coordinates

and sums of ``X`` and ``W`` wrap around like any ring. The mean is ``sum(X) / 2**fraction_bits /
(sum(W) / 2**WEIGHT_BITS)``; because ``X`` is made with the quantised weight, sites that agree on a
coordinate get that coordinate back whatever their weights.

Error of one coordinate of the mean against exact arithmetic over the quantised weights, with ``n``
replies::

    n * (2**-(fraction_bits + 1) + coordinate_bound * 2**-51) / sum(W / 2**WEIGHT_BITS)

The first term is rounding to the grid; the second covers the roundings in double precision: the
product before it, the sum and the weight read back, and the division. No sum wraps:
:meth:`RingEncoding.plan` chooses ``fraction_bits`` so that ``cohort`` replies at the bound stay
within half the ring, or refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["WEIGHT_BITS", "RingEncoding", "RingSum"]

Ring = npt.NDArray[np.uint64]

WEIGHT_BITS = 40
"""Resolution of a weight as a fraction of its bound: a weight below w_bound * 2**-41 is refused."""

_DOUBLE_BITS = 52  # products up to this size are exact to half a unit of the grid
_LEAST_SIGNIFICANT_BITS = 8
_BOUND_RANGE = (2.0**-900, 2.0**900)  # beyond it the grid itself leaves double precision
_SLICE = 1 << 14  # elements encoded at a time: the double-precision temporaries stay in cache


@dataclass(frozen=True)
class RingEncoding:
    """How coordinates and weights become integers modulo ``2**bits``.

    Args:
        bits: Size of the ring in bits, 16 to 64.
        fraction_bits: A coordinate is a multiple of ``2**-fraction_bits``.
        coordinate_bound: Largest absolute coordinate that is encoded faithfully.
        weight_bound: Largest weight.
        cohort: Largest number of replies in a sum.
        weight_bits: A weight is a multiple of ``weight_bound * 2**-weight_bits``.
    """

    bits: int
    fraction_bits: int
    coordinate_bound: float
    weight_bound: float
    cohort: int
    weight_bits: int = WEIGHT_BITS

    @classmethod
    def plan(
        cls, *, cohort: int, coordinate_bound: float, weight_bound: float, bits: int = 64
    ) -> RingEncoding:
        """Choose the finest grid on which a sum of ``cohort`` replies cannot wrap.

        Raises:
            ValueError: A bound is not positive and finite, the coordinate bound is out of the range
                of double precision, or the ring leaves fewer than 8 significant bits to a
                coordinate at the bound.
        """
        least, largest = _BOUND_RANGE
        if not least <= coordinate_bound <= largest:
            raise ValueError(
                f"coordinate bound {coordinate_bound} is not in [{least:.3g}, {largest:.3g}]"
            )
        if not (math.isfinite(weight_bound) and weight_bound > 0):
            raise ValueError(f"weight bound {weight_bound} is not positive and finite")
        if cohort < 1 or not 16 <= bits <= 64:
            raise ValueError(f"cohort {cohort} or ring of {bits} bits out of range")
        bound_bits = math.ceil(math.log2(coordinate_bound))
        # One bit for the sign and one that absorbs rounding at the bound.
        room = bits - 2 - math.ceil(math.log2(cohort))
        significant = min(room, _DOUBLE_BITS)
        if significant < _LEAST_SIGNIFICANT_BITS:
            raise ValueError(
                f"a ring of {bits} bits leaves {significant} bits to each of {cohort} replies; "
                "use a larger ring or a smaller cohort"
            )
        return cls(bits, significant - bound_bits, coordinate_bound, weight_bound, cohort)

    @property
    def grid(self) -> float:
        """Return the distance of two neighbouring coordinates before weighting."""
        return 2.0**-self.fraction_bits

    def bits_lost_to_weight(self, weight: float) -> float:
        """Return the significant bits a reply of this weight loses against one at the bound."""
        return math.log2(self.weight_bound / weight)

    def error_bound(self, replies: int, total_weight: float) -> float:
        """Return the largest error of one coordinate of the mean.

        Args:
            replies: Number of replies in the sum.
            total_weight: Their total weight, in units of the weight bound.
        """
        each = 0.5 * self.grid + self.coordinate_bound * 2.0 ** (1 - _DOUBLE_BITS)
        return replies * each / total_weight

    def encode_weight(self, weight: float) -> int:
        """Return a weight as an integer of ``weight_bits`` fractional bits.

        Raises:
            ValueError: The weight is not finite, not positive, above the bound, or rounds to zero.
        """
        if not 0 < weight <= self.weight_bound:  # NaN compares false
            raise ValueError(f"weight {weight!r} is not in (0, {self.weight_bound:g}]")
        encoded = round(math.ldexp(weight / self.weight_bound, self.weight_bits))
        if encoded == 0:
            raise ValueError(f"weight {weight!r} is too small beside {self.weight_bound:g}")
        return encoded

    def encode(self, values: npt.NDArray[np.floating], encoded_weight: int) -> tuple[Ring, int]:
        """Return weighted coordinates in the ring and how many saturated at the bound.

        Args:
            values: ``[n]``, finite.
            encoded_weight: From :meth:`encode_weight`.

        Returns:
            ``[n]`` uint64 below ``2**bits``, and the number of coordinates that lay beyond the
            bound.

        Raises:
            ValueError: A value is NaN.
        """
        scale = math.ldexp(encoded_weight, self.fraction_bits - self.weight_bits)
        scaled = values.astype(np.float64)
        scaled *= scale
        limit = self.coordinate_bound * scale
        saturated = 0
        # One comparison in the ordinary case; NaN fails it too, because max and min hand it on.
        if scaled.size and not (scaled.max() <= limit and scaled.min() >= -limit):
            if np.isnan(scaled).any():
                raise ValueError("NaN cannot be encoded")
            saturated = int(np.count_nonzero(np.abs(scaled) > limit))
            np.clip(scaled, -limit, limit, out=scaled)
        np.rint(scaled, out=scaled)
        return scaled.astype(np.int64).view(np.uint64) & self.mask, saturated

    def decode(self, total: Ring) -> npt.NDArray[np.float64]:
        """Return the weighted sum that ring elements stand for, in units of the weight bound.

        Args:
            total: ``[n]`` uint64 below ``2**bits``.

        Returns:
            ``[n]`` float64.
        """
        return np.ldexp(self.signed(total).astype(np.float64), -self.fraction_bits)

    def signed(self, total: Ring) -> npt.NDArray[np.int64]:
        """Return the whole numbers nearest to zero that ring elements stand for, in grid steps.

        Args:
            total: ``[n]`` uint64 below ``2**bits``.

        Returns:
            ``[n]`` int64.
        """
        shift = np.uint64(64 - self.bits)
        signed: npt.NDArray[np.int64] = (total << shift).view(np.int64) >> np.int64(64 - self.bits)
        return signed

    @property
    def mask(self) -> np.uint64:
        """Return the ring's largest element, whose bits are all one."""
        return np.uint64((1 << self.bits) - 1)


@dataclass
class RingSum:
    """A running sum of one named vector: one ring vector, whatever the number of replies.

    Args:
        encoding: How coordinates become integers.
        size: Length of the vector, in elements.
    """

    encoding: RingEncoding
    size: int
    replies: int = 0
    weight: int = 0
    saturated: int = 0
    _total: Ring = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._total = np.zeros(self.size, dtype=np.uint64)

    def add(self, values: npt.NDArray[np.floating], weight: float) -> None:
        """Add one reply.

        Args:
            values: ``[size]`` floating point, finite; read by slices, twice.
            weight: In (0, weight bound].

        Raises:
            ValueError: Wrong length, NaN, a weight out of range, or more replies than the cohort.
                The sum is then as it was before.
        """
        if values.shape != (self.size,):
            raise ValueError(f"vector has shape {values.shape}, the sum has ({self.size},)")
        if self.replies >= self.encoding.cohort:
            raise ValueError(f"the sum is planned for {self.encoding.cohort} replies")
        encoded_weight = self.encoding.encode_weight(weight)
        for part in _slices(self.size):  # before anything is added
            if np.isnan(values[part].max()):
                raise ValueError("NaN cannot be added")
        for part in _slices(self.size):
            encoded, saturated = self.encoding.encode(values[part], encoded_weight)
            self._total[part] += encoded  # wraps modulo 2**64, as it should
            self.saturated += saturated
        if self.encoding.bits < 64:
            self._total &= np.uint64((1 << self.encoding.bits) - 1)
        self.replies += 1
        self.weight += encoded_weight

    def total(self) -> Ring:
        """Return a copy of the sum in the ring, ``[size]`` uint64."""
        return self._total.copy()

    def sum(self) -> npt.NDArray[np.float64]:
        """Return the weighted sum, ``[size]`` float64, in units of the weight bound."""
        decoded = np.empty(self.size, dtype=np.float64)
        for part in _slices(self.size):
            decoded[part] = self.encoding.decode(self._total[part])
        return decoded

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the weighted mean, ``[size]`` float64.

        Raises:
            ValueError: Nothing was added.
        """
        return self._mean(np.empty(self.size, dtype=np.float64))

    def into_mean(self) -> npt.NDArray[np.float64]:
        """Return the weighted mean, ``[size]`` float64, in the sum's own memory; it is empty then.

        Raises:
            ValueError: Nothing was added.
        """
        mean = self._mean(self._total.view(np.float64))
        self._total = np.zeros(self.size, dtype=np.uint64)  # untouched zeros take no memory
        self.replies = self.weight = self.saturated = 0
        return mean

    def _mean(self, mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.replies == 0:
            raise ValueError("a sum of no replies has no mean")
        weight = math.ldexp(self.weight, -self.encoding.weight_bits)
        for part in _slices(self.size):
            mean[part] = self.encoding.decode(self._total[part]) / weight
        return mean


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, _SLICE):
        yield slice(start, min(start + _SLICE, size))

"""Exact samples of a distribution over the integers, many at a time.

Noise that is rounded from floating point has holes and a pattern in its low bits, from which sums
can be told apart (I. Mironov, CCS 2012). Here every sample is an integer, its distribution is the
one that was accounted for, and floating point only decides cases in which it cannot be wrong.

The support is cut into blocks of equal, power-of-two width. A block is drawn by the alias method
(A. J. Walker, 1977; M. D. Vose, 1991) from integer weights ``q`` that sum to 2**64, a place in it
from raw bits, so the proposal is an exact rational distribution. A proposal ``k`` of block ``j``
is kept with probability ``f(k) * width * scale / q[j]``, at most 1 by construction. That leaves
exactly ``f``, whatever the weights are (rejection sampling, J. von Neumann, 1951).

Keeping with a real probability is a comparison of it with a uniform number. The double-precision
value of the probability decides if it is farther from the uniform number than ``DOUBT``, a bound
on the error a thousand times over; what is closer (one sample in 10**12) is decided in decimal
arithmetic, with as many further bits of the uniform number as it takes.

What is not exact: the support is cut where less than ``tail`` of the mass is left, at most 2**-120
for each sample. :mod:`lepton_fed.privacy.distributed.accounting` adds that to delta.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["DOUBT", "TAIL_EXPONENT", "Density", "IntegerSampler", "Integers", "Reals"]

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

DOUBT = 2.0**-40
"""A probability this close to the uniform number is computed again, in decimal arithmetic."""

TAIL_EXPONENT = 84.5
"""Supports are cut where a tail bound falls below exp(-84.5), on each side."""

_BLOCKS_PER_DEVIATION = 32  # proposals are then kept in 98 of 100 cases
_SLICE = 1 << 13  # proposals made at a time: the temporaries stay in cache
_WORD = 1 << 64
_FIRST_DIGITS = 60


class Density(Protocol):
    """What a sampler has to know of a distribution with one mode.

    Attributes:
        low: Smallest integer of the support.
        high: Largest integer of the support.
        mode: Where the mass is largest.
        deviation: Standard deviation, in units.
        tail: Bound of the mass outside of the support.
    """

    @property
    def low(self) -> int: ...  # noqa: D102
    @property
    def high(self) -> int: ...  # noqa: D102
    @property
    def mode(self) -> int: ...  # noqa: D102
    @property
    def deviation(self) -> float: ...  # noqa: D102
    @property
    def tail(self) -> float: ...  # noqa: D102

    def log_mass(self, at: Reals) -> Reals:
        """Return the logarithm of the mass, up to a constant, within 2**-43 of the truth.

        Args:
            at: Integers, as float64 of any shape; changed by the call.
        """
        ...

    def exact_log_mass(self, at: int, context: Context) -> Decimal:
        """Return the same logarithm within ``10**(20 - context.prec)``."""
        ...


class IntegerSampler:
    """Draws from a density over the integers.

    Args:
        density: What to draw from; at most 2**40 wide in units of one deviation.
        doubt: Distance below which a comparison is made in decimal arithmetic.

    Raises:
        ValueError: The doubt is smaller than the error of double precision.
    """

    def __init__(self, density: Density, *, doubt: float = DOUBT) -> None:
        if doubt < DOUBT:
            raise ValueError(f"doubt {doubt} is below {DOUBT}")
        self.density = density
        self._doubt = doubt
        per_block = density.deviation / _BLOCKS_PER_DEVIATION
        self._width_bits = max(0, math.floor(math.log2(per_block))) if per_block > 0 else 0
        width = 1 << self._width_bits
        blocks = -(-(density.high - density.low + 1) // width)
        starts = density.low + width * np.arange(blocks, dtype=np.int64)
        best = np.clip(density.mode, starts, starts + (width - 1))
        height = np.exp(density.log_mass(best.astype(np.float64)))
        self._scale = float(_WORD * (1 - 2.0**-20) / (height.sum() * width))
        # Rounded up by more than the error of exp, so that no probability exceeds one.
        needed = height * width * self._scale * (1 + 2.0**-40)
        self._weights = [int(value) + 1 for value in needed.tolist()]
        self._columns = _columns(blocks + 1)
        # What is left of 2**64 proposes nothing.
        weights = [*self._weights, _WORD - sum(self._weights)]
        thresholds, aliases = _alias(weights, self._columns)
        self._thresholds = np.array(thresholds, dtype=np.uint64)
        self._aliases = np.array(aliases, dtype=np.int64)
        padding = [-math.inf] * (self._columns - blocks)
        bounds = [math.log(width * self._scale / weight) for weight in self._weights]
        self._bounds = np.array(bounds + padding)
        self._starts = np.concatenate([starts, np.zeros(len(padding), dtype=np.int64)])
        self._kept: Reals | None = None
        if width == 1:  # then the probability depends on the block only
            with np.errstate(under="ignore"):
                log_mass = density.log_mass(self._starts.astype(np.float64))
                self._kept = np.exp(log_mass + self._bounds)

    def draw(self, count: int, entropy: Entropy) -> Integers:
        """Return independent samples.

        Args:
            count: How many.
            entropy: Where the bits come from.

        Returns:
            ``[count]`` int64.
        """
        samples = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            missing = count - filled
            proposals = min(_SLICE, missing + missing // 16 + 16)
            kept = self._propose(proposals, entropy)[:missing]
            samples[filled : filled + kept.size] = kept
            filled += kept.size
        return samples

    def _propose(self, count: int, entropy: Entropy) -> Integers:
        words = entropy.words(3 * count).reshape(3, count)
        remainder_bits = np.uint64(64 - (self._columns.bit_length() - 1))
        column = (words[0] >> remainder_bits).view(np.int64)
        remainder = words[0] & np.uint64((1 << int(remainder_bits)) - 1)
        block = np.where(remainder < self._thresholds[column], column, self._aliases[column])
        value = self._starts[block]
        if self._kept is None:
            value += (words[1] & np.uint64((1 << self._width_bits) - 1)).view(np.int64)
            kept = self.density.log_mass(value.astype(np.float64))
            kept += self._bounds[block]
            np.exp(kept, out=kept)
        else:
            kept = self._kept[block]
        uniform = (words[2] >> np.uint64(11)).astype(np.float64)
        uniform *= 2.0**-53
        kept -= uniform
        accepted = kept > 0
        np.abs(kept, out=kept)
        if kept.min() <= self._doubt:
            for index in np.flatnonzero(kept <= self._doubt).tolist():
                at, bits = int(block[index]), int(words[2][index])
                accepted[index] = self._decide(at, int(value[index]), bits, entropy)
        samples: Integers = value[accepted]
        return samples

    def _decide(self, block: int, value: int, bits: int, entropy: Entropy) -> bool:
        """Return whether a uniform number that starts with 64 bits is below the probability."""
        if block >= len(self._weights):
            return False
        ratio = Fraction(self._scale) * (1 << self._width_bits) / self._weights[block]
        length, digits = 64, _FIRST_DIGITS
        while True:
            context = Context(prec=digits)
            mass = context.exp(self.density.exact_log_mass(value, context))
            factor = context.divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
            probability = Fraction(context.multiply(mass, factor))
            error = Fraction(1, 10 ** (digits - 25))
            lowest = Fraction(bits, 1 << length)
            if lowest >= probability + error:
                return False
            if lowest + Fraction(1, 1 << length) <= probability - error:
                return True
            bits = (bits << 64) | int(entropy.words(1)[0])
            length, digits = length + 64, digits + 20


def _columns(outcomes: int) -> int:
    return 1 << max(1, (outcomes - 1).bit_length())


def _alias(weights: list[int], columns: int) -> tuple[list[int], list[int]]:
    """Return thresholds and aliases of integer weights that sum to 2**64 (Vose 1991)."""
    room = _WORD // columns
    left = weights + [0] * (columns - len(weights))
    thresholds, aliases = [room] * columns, list(range(columns))
    small = [index for index, weight in enumerate(left) if weight < room]
    large = [index for index, weight in enumerate(left) if weight >= room]
    while small:
        index, giver = small.pop(), large[-1]
        thresholds[index], aliases[index] = left[index], giver
        left[giver] -= room - left[index]
        if left[giver] < room:
            small.append(large.pop())
    return thresholds, aliases

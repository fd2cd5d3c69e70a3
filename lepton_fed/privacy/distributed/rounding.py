"""Rounding to the grid with a hard bound on the norm of what comes out.

Randomised rounding is unbiased, but can lengthen a vector of ``d`` coordinates by ``sqrt(d)`` in
the worst case and ``sqrt(d) / 2`` in the typical one. Rounding again until the norm is at most the
typical one makes that the sensitivity, at the price of a bias that is tiny for small ``beta``.

Whether the norm is within the bound is decided in integers: floating point may influence which
integers come out, never how long they are.

References:
    P. Kairouz, Z. Liu, T. Steinke, ICML 2021, arXiv:2102.06387, section 4 (conditional rounding)
    and algorithm 1.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["BETA", "conditionally_rounded", "squared_norm", "squared_norm_limit"]

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

BETA = math.exp(-0.5)
"""Kairouz, Liu and Steinke's choice: at most 60.7 % of roundings are thrown away."""

_SLICE = 1 << 14
_LARGEST = 1 << 40
_LOW_BITS = 20
_TRIES = 2000  # all of them fail with probability beta**2000 at most, 10**-434


def squared_norm_limit(clip: float, dimension: int, beta: float = BETA) -> int:
    """Return the largest squared norm of a rounded vector.

    Args:
        clip: Norm before rounding, at most, in units of the grid.
        dimension: Coordinates.
        beta: Probability, at most, with which a rounding is thrown away; 0 for never.

    Returns:
        ``min((clip + sqrt(d))**2, clip**2 + d/4 + sqrt(2 log(1/beta)) (clip + sqrt(d)/2))``,
        rounded down: squared norms are integers.

    Raises:
        ValueError: A number is out of range.
    """
    if not (0 < clip < math.inf and dimension >= 1 and 0 <= beta < 1):
        raise ValueError(f"clip {clip}, dimension {dimension}, beta {beta}")
    root = math.sqrt(dimension)
    always = (clip + root) ** 2
    if beta == 0:
        return math.floor(always)
    mostly = clip**2 + dimension / 4 + math.sqrt(-2 * math.log(beta)) * (clip + root / 2)
    return math.floor(min(always, mostly))


def squared_norm(values: Integers) -> int:
    """Return the squared norm of integers below 2**40, exactly.

    Raises:
        ValueError: One is larger.
    """
    total = 0
    for start in range(0, values.size, _SLICE):
        part = values[start : start + _SLICE]
        if max(int(part.max()), -int(part.min())) >= _LARGEST:
            raise ValueError("a coordinate is beyond 2**40 units of the grid")
        high, low = part >> _LOW_BITS, part & ((1 << _LOW_BITS) - 1)
        total += int(high @ high) << (2 * _LOW_BITS)
        total += (int(high @ low) << (_LOW_BITS + 1)) + int(low @ low)
    return total


def conditionally_rounded(values: Reals, limit: int, entropy: Entropy) -> Integers:
    """Round each coordinate up or down at random, until the whole is short enough.

    Args:
        values: ``[d]`` float64, finite, in units of the grid.
        limit: Largest squared norm of the result, from :func:`squared_norm_limit`.
        entropy: Where the bits come from.

    Returns:
        ``[d]`` int64; its squared norm is at most ``limit``, always.

    Raises:
        ValueError: A value is not finite or beyond 2**40 units, or the values are so much longer
            than what the limit was made for that no rounding of them is within it.
    """
    if not (np.abs(values).max(initial=0.0) < _LARGEST - 1):  # NaN compares false
        raise ValueError("values that are not finite, or beyond 2**40 units of the grid")
    rounded = np.empty(values.size, dtype=np.int64)
    for _ in range(_TRIES):
        for start in range(0, values.size, _SLICE):
            part = values[start : start + _SLICE]
            below = np.floor(part)
            up = entropy.uniform(part.size) < part - below
            rounded[start : start + _SLICE] = below.astype(np.int64) + up
        if squared_norm(rounded) <= limit:
            return rounded
    raise ValueError("no rounding of the values is within the limit")

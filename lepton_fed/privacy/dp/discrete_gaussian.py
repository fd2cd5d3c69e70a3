"""The discrete Gaussian: integers ``k`` with probability proportional to exp(-k**2 / 2 sigma**2).

References:
    C. Canonne, G. Kamath, T. Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS
    2020, arXiv:2004.00010: definition 1; it is sigma-subgaussian (section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import TAIL_EXPONENT, Integers, IntegerSampler, Reals

__all__ = ["LARGEST_SIGMA", "DiscreteGaussian", "discrete_gaussian"]

LARGEST_SIGMA = 2.0**40
_SMALLEST_SIGMA = 2.0**-3


@dataclass(frozen=True)
class DiscreteGaussian:
    """The density of the discrete Gaussian around 0.

    Args:
        sigma: The parameter, in units; the standard deviation is at most this much, and equal to it
            for all purposes from sigma 1 on.

    Raises:
        ValueError: Sigma is not in [2**-3, 2**40].
    """

    sigma: float

    def __post_init__(self) -> None:
        if not _SMALLEST_SIGMA <= self.sigma <= LARGEST_SIGMA:
            raise ValueError(
                f"sigma {self.sigma} is not in [{_SMALLEST_SIGMA:g}, {LARGEST_SIGMA:g}]"
            )

    @property
    def high(self) -> int:
        """Return the largest sample, 13 sigma."""
        return math.ceil(self.sigma * math.sqrt(2 * TAIL_EXPONENT))

    @property
    def low(self) -> int:
        """Return the smallest sample."""
        return -self.high

    @property
    def mode(self) -> int:
        """Return 0."""
        return 0

    @property
    def deviation(self) -> float:
        """Return sigma."""
        return self.sigma

    @property
    def tail(self) -> float:
        """Return the bound of the mass that is cut off, 2 exp(-84.5): it is subgaussian."""
        return 2 * math.exp(-TAIL_EXPONENT)

    def log_mass(self, at: Reals) -> Reals:
        """Return ``-at**2 / 2 sigma**2``, computed in place."""
        np.multiply(at, at, out=at)
        at *= -0.5 / self.sigma**2
        return at

    def exact_log_mass(self, at: int, context: Context) -> Decimal:
        """Return the same, correct to the context's precision."""
        exponent = Fraction(at * at) / (2 * Fraction(self.sigma) ** 2)
        return context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))


@lru_cache(maxsize=64)
def _sampler(sigma: float) -> IntegerSampler:
    return IntegerSampler(DiscreteGaussian(sigma))


def discrete_gaussian(sigma: float, count: int, entropy: Entropy) -> Integers:
    """Draw from the discrete Gaussian.

    Args:
        sigma: Its parameter, in units, in [2**-3, 2**40].
        count: How many samples.
        entropy: Where the bits come from.

    Returns:
        ``[count]`` int64; their distribution is off by at most 2**-120 for each.

    Raises:
        ValueError: Sigma is out of range.
    """
    return _sampler(sigma).draw(count, entropy)

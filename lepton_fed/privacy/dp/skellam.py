"""Skellam noise: the difference of two Poisson variables. Sums of it are Skellam again.

The Poisson mass is evaluated by its deviance (C. Loader, "Fast and Accurate Computation of Binomial
Probabilities", 2000, section 3): ``log f(k) = -D(k) - stirling(k) - log(2 pi k) / 2`` with
``D(k) = k log(k / m) + m - k``, which loses no digits around the mean ``m``.

References:
    N. Agarwal, P. Kairouz, Z. Liu, "The Skellam Mechanism for Differentially Private Federated
    Learning", NeurIPS 2021, arXiv:2110.04995, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import TAIL_EXPONENT, Integers, IntegerSampler, Reals

__all__ = ["LARGEST_VARIANCE", "Poisson", "skellam"]

LARGEST_VARIANCE = 2.0**50
_SMALLEST_VARIANCE = 2.0**-6

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_PI = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803483"
_DECIMAL_DIGITS = 80  # a resolved comparison asks for 60; pi above has more than these
_EXACT_FACTORIALS = 1000
_SMALL_FACTORIALS = 16
_BERNOULLI = [(1, 6), (-1, 30), (1, 42), (-1, 30), (5, 66), (-691, 2730), (7, 6), (-3617, 510)]
_BERNOULLI += [(43867, 798), (-174611, 330), (854513, 138), (-236364091, 2730)]


@dataclass(frozen=True)
class Poisson:
    """The density of a Poisson variable.

    Args:
        mean: Its mean, in units.

    Raises:
        ValueError: The mean is not in [2**-7, 2**49].
    """

    mean: float

    def __post_init__(self) -> None:
        if not _SMALLEST_VARIANCE / 2 <= self.mean <= LARGEST_VARIANCE / 2:
            raise ValueError(f"mean {self.mean} is out of range")

    @cached_property
    def high(self) -> int:
        """Return where the Chernoff bound of the upper tail falls below exp(-84.5)."""
        # Bernstein's inequality gives a place that is certainly far enough.
        certain = self.mean + math.sqrt(2 * TAIL_EXPONENT * self.mean) + 2 * TAIL_EXPONENT
        return _first(math.ceil(self.mean), math.ceil(certain), self._is_cut)

    @cached_property
    def low(self) -> int:
        """Return where that of the lower tail does; 0 if nowhere."""
        if not self._is_cut(0):
            return 0
        last = math.floor(self.mean)
        return last - _first(0, last, lambda below: self._is_cut(last - below))

    @property
    def mode(self) -> int:
        """Return the integer below the mean."""
        return math.floor(self.mean)

    @property
    def deviation(self) -> float:
        """Return the square root of the mean."""
        return math.sqrt(self.mean)

    @property
    def tail(self) -> float:
        """Return the bound of the mass that is cut off, 2 exp(-84.5)."""
        return 2 * math.exp(-TAIL_EXPONENT)

    def log_mass(self, at: Reals) -> Reals:
        """Return the logarithm of the mass, by Loader's expansion."""
        result = -_deviance(at, self.mean)
        some = np.maximum(at, 1.0)
        small = at < _SMALL_FACTORIALS
        if small.any():
            result -= np.where(small, _small_errors()[np.minimum(at, 15).astype(np.int64)], 0.0)
            result -= np.where(small, 0.0, _stirling(np.maximum(at, _SMALL_FACTORIALS)))
        else:
            result -= _stirling(some)
        np.log(some, out=some)
        some *= 0.5
        some += _HALF_LOG_2PI
        result -= np.where(at > 0, some, 0.0) if small.any() else some
        return result

    def exact_log_mass(self, at: int, context: Context) -> Decimal:
        """Return the same in decimal arithmetic: ``at log(mean) - mean - log(at!)``.

        Raises:
            ArithmeticError: More digits are asked for than pi is known to here: after more than a
                hundred equal bits, which nobody will see.
        """
        if context.prec > _DECIMAL_DIGITS:
            raise ArithmeticError(f"{context.prec} digits of a Poisson mass")
        wide = Context(prec=_DECIMAL_DIGITS)
        mean = Decimal(self.mean)  # exact: a float is a fraction of a power of two
        log_mean = wide.ln(mean)
        power = wide.multiply(Decimal(at), log_mean)
        return wide.subtract(wide.subtract(power, mean), _exact_log_factorial(at, wide))

    def _is_cut(self, at: int) -> bool:
        return float(_deviance(np.array([float(at)]), self.mean)[0]) >= TAIL_EXPONENT


def skellam(variance: float, count: int, entropy: Entropy) -> Integers:
    """Draw from the symmetric Skellam distribution.

    Args:
        variance: Its variance, in units squared, in [2**-6, 2**50].
        count: How many samples.
        entropy: Where the bits come from.

    Returns:
        ``[count]`` int64; their distribution is off by at most 2**-119 for each.

    Raises:
        ValueError: The variance is out of range.
    """
    if not _SMALLEST_VARIANCE <= variance <= LARGEST_VARIANCE:
        raise ValueError(f"variance {variance} is out of range")
    poisson = _sampler(variance / 2)
    samples = poisson.draw(count, entropy)
    samples -= poisson.draw(count, entropy)
    return samples


@lru_cache(maxsize=64)
def _sampler(mean: float) -> IntegerSampler:
    return IntegerSampler(Poisson(mean))


def _deviance(at: Reals, mean: float) -> Reals:
    """Return ``at log(at / mean) + mean - at`` (Loader 2000, bd0)."""
    off = at - mean
    ratio = off / (at + mean)
    largest = float(np.abs(ratio).max())
    if largest > 0.25:  # only far away from the mean, where nothing cancels
        some = np.maximum(at, 1.0)
        return np.where(at > 0, at * np.log(some / mean), 0.0) - off
    square = ratio * ratio
    # Sum of ratio**2i / (2i + 1), from the last term that matters to the first.
    terms = 1 if largest == 0 else max(1, math.ceil(math.log(2.0**-56) / (2 * math.log(largest))))
    series = np.full_like(square, 1.0 / (2 * terms + 1))
    for term in range(terms - 1, 0, -1):
        series *= square
        series += 1.0 / (2 * term + 1)
    series *= square
    series *= at
    series *= 2.0
    series += off
    series *= ratio
    return series


def _stirling(at: Reals) -> Reals:
    """Return ``log(at!) - (at + 1/2) log(at) + at - log(2 pi) / 2`` from 16 on."""
    inverse = 1.0 / at
    square = inverse * inverse
    series = square * (-1.0 / 1680)
    series += 1.0 / 1260
    series *= square
    series -= 1.0 / 360
    series *= square
    series += 1.0 / 12
    series *= inverse
    return series


@lru_cache(maxsize=1)
def _small_errors() -> Reals:
    """Return the same below 16, [16]; 0 for 0, whose factor is 1."""
    exact = [0.0]
    for at in range(1, _SMALL_FACTORIALS):
        stirling = (at + 0.5) * math.log(at) - at + _HALF_LOG_2PI
        exact.append(math.log(math.factorial(at)) - stirling)
    return np.array(exact)


def _exact_log_factorial(at: int, context: Context) -> Decimal:
    if at <= _EXACT_FACTORIALS:
        return context.ln(Decimal(math.factorial(at)))
    number = Decimal(at)
    half = context.add(number, Decimal("0.5"))
    total = context.subtract(context.multiply(half, context.ln(number)), number)
    log_two_pi = context.ln(context.multiply(Decimal(2), Decimal(_PI)))
    total = context.add(total, context.divide(log_two_pi, Decimal(2)))
    for index, (top, bottom) in enumerate(_BERNOULLI, start=1):
        term = Fraction(top, bottom * 2 * index * (2 * index - 1) * at ** (2 * index - 1))
        total = context.add(
            total, context.divide(Decimal(term.numerator), Decimal(term.denominator))
        )
    return total


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number for which a monotone condition holds; it does at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low

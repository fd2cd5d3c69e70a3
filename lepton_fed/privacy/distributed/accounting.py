"""What a sum with shares of discrete noise costs.

All quantities are in units of the grid. ``sigma`` is the parameter of one share, ``h`` the number
of shares that count, those of honest sites; ``D2`` bounds the norm by which one protected unit
moves the sum, an integer vector; ``d`` is the number of coordinates (of the padded, rotated
vector).

**Discrete Gaussian.** Two valid bounds, and the smaller one is taken.

1. Kairouz, Liu, Steinke 2021, theorem 1: each round is ``e**2 / 2``-zCDP with ``tau = 10 sum_{k<h}
   exp(-2 pi**2 sigma**2 k / (k+1))`` and ``e = min(sqrt(D2**2 / (h sigma**2) + tau d / 2),
   D2 / (sqrt(h) sigma) + tau sqrt(d))``; turned into epsilon and delta at the best Rényi order.

2. Domination by a continuous Gaussian, whose privacy loss is known exactly. Let ``k(v)`` be ``2
   sum_{m>=1} exp(-2 pi**2 v m**2)``; by Poisson's summation formula ``sum_j exp(-(j-x)**2 / 2v)``
   differs from ``sqrt(2 pi v)`` by a factor in ``1 -+ k(v)``, whatever ``x`` is.

   (a) The convolution of discrete Gaussians of variance ``a`` and ``b`` has at ``i`` the mass
   ``exp(-i**2 / 2(a+b))`` times such a sum with ``v = ab/(a+b)``. So the sum of ``h`` shares and
   the discrete Gaussian of variance ``h sigma**2`` differ by a factor of at most ``exp(t)``,
   ``t = sum_{k<h} log((1+k_k) / (1-k_k))`` with ``k_k = k(sigma**2 k / (k+1))``.

   (b) A continuous Gaussian of variance ``h sigma**2 - v`` that is rounded to an integer ``i`` with
   probability proportional to ``exp(-(i-x)**2 / 2v)`` has at ``i`` the mass ``exp(-i**2 / 2 h
   sigma**2)`` over such a sum (C. Peikert, CRYPTO 2010, theorem 3.1). It differs from the discrete
   Gaussian of variance ``h sigma**2`` by a factor of at most ``exp(s)``, ``s = log((1+k(v)) /
   (1-k(v)))``; and the rounding commutes with integer shifts, so it is post-processing of the
   Gaussian mechanism.

   With ``e = d (t + s)`` for each round, ``delta(epsilon) <= exp(R e) delta_G(epsilon - 2 R e)``
   over R rounds, where ``delta_G`` is that of R Gaussian mechanisms of variance ``h sigma**2 - v``
   and sensitivity ``D2``. With ``v`` about 3, ``R e`` is below 1e-9 and the whole price of
   discreteness is ``v`` units of variance.

**Skellam.** Agarwal, Kairouz, Liu 2021, section 3: with ``m`` the variance of the sum and
``D1 = min(sqrt(d) D2, D2**2)`` (a bound of the 1-norm of integers), for whole orders ``a > 1``
``RDP(a) <= a D2**2 / 2m + min(((2a-1) D2**2 + 6 D1) / 4m**2, 3 D1 / 2m)``.

**What is sampled** is off by ``2**-119`` at most for each coordinate and share
(:mod:`lepton_fed.privacy.dp.integers`); that is added to delta.

References:
    P. Kairouz, Z. Liu, T. Steinke, ICML 2021, arXiv:2102.06387, theorem 1 and proposition 14.
    N. Agarwal, P. Kairouz, Z. Liu, NeurIPS 2021, arXiv:2110.04995, section 3.
    C. Canonne, G. Kamath, T. Steinke, NeurIPS 2020, arXiv:2004.00010, proposition 12 (Rényi to
    epsilon and delta).
    B. Balle, Y.-X. Wang, ICML 2018, arXiv:1805.06530, theorem 8 (the Gaussian mechanism, exactly).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "ADJACENCY",
    "DiscreteGaussianShares",
    "Shares",
    "SkellamShares",
    "epsilon_of_gaussian",
    "epsilon_of_renyi",
    "epsilon_of_zcdp",
]

Reals = npt.NDArray[np.float64]

ADJACENCY = "zero-out-one-site"
"""Neighbours: one site sends zeros and its noise. How many sites there are is public."""

_SAMPLING_ERROR = 2.0**-119  # of one coordinate of one share
_MOST_ADDED = 1e-9  # by rounding, to the logarithm of a ratio, over all coordinates and rounds
_LARGEST_EPSILON = 1e6
_ORDERS = np.concatenate([1 + np.logspace(-3, 4, 4000)])
_WHOLE_ORDERS = np.unique(np.round(np.logspace(math.log10(2), 5, 1500)))


@dataclass(frozen=True)
class Shares(ABC):
    """Rounds in which ``shares`` sites each add noise to one sum.

    Args:
        sigma: Parameter of one share (its standard deviation), in units of the grid.
        shares: Shares that count: of sites that are honest and in the sum.
        squared_sensitivity: Square of ``D2``, in units of the grid squared.
        dimension: Coordinates of the sum.
        rounds: How many times a sum is released.

    Raises:
        ValueError: A number is out of range.
    """

    sigma: float
    shares: int
    squared_sensitivity: float
    dimension: int
    rounds: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.sigma < math.inf and 0 < self.squared_sensitivity < math.inf):
            raise ValueError(f"no such mechanism: {self}")
        if self.shares < 1 or self.dimension < 1 or self.rounds < 0:
            raise ValueError(f"no such mechanism: {self}")

    @property
    def variance(self) -> float:
        """Return the variance of the noise in the sum, in units of the grid squared."""
        return self.shares * self.sigma**2

    @abstractmethod
    def epsilon(self, delta: float) -> float:
        """Return epsilon of all rounds together.

        Args:
            delta: Delta of the guarantee, in (0, 1).

        Returns:
            Epsilon; infinity if the samples' own error does not leave room for it at this delta.
        """

    @property
    def _coordinates(self) -> int:
        return self.dimension * self.shares * self.rounds


class DiscreteGaussianShares(Shares):
    """Shares of discrete Gaussian noise; for the arguments see :class:`Shares`."""

    def zcdp(self) -> float:
        """Return rho of all rounds: they are rho-zCDP (Kairouz, Liu, Steinke 2021).

        Infinity for several shares of sigma below 1/2, for which the theorem says nothing.
        """
        if self.shares > 1 and self.sigma < 0.5:
            return math.inf
        tau = 10 * sum(
            math.exp(-2 * math.pi**2 * self.sigma**2 * k / (k + 1)) for k in range(1, self.shares)
        )
        ratio = self.squared_sensitivity / self.variance
        first = math.sqrt(ratio + tau * self.dimension / 2)
        second = math.sqrt(ratio) + tau * math.sqrt(self.dimension)
        return self.rounds * 0.5 * min(first, second) ** 2

    def dominating_gaussian(self) -> tuple[float, float]:
        """Return the continuous Gaussian that each round is post-processing of, nearly.

        Returns:
            Its noise multiplier, 0 if there is none; and the largest logarithm of the ratio between
            the two, over all coordinates and rounds (``R e`` above).
        """
        places = self.dimension * max(1, self.rounds)
        # k(v) is 2 exp(-2 pi**2 v) but for terms that are smaller still, and s is 2 k.
        lost = math.log(4 * places / _MOST_ADDED) / (2 * math.pi**2)
        if self.variance <= 2 * lost:
            return 0.0, math.inf
        each = _log_ratio(lost)
        each += sum(_log_ratio(self.sigma**2 * k / (k + 1)) for k in range(1, self.shares))
        noise = math.sqrt((self.variance - lost) / self.squared_sensitivity)
        return noise, places * each

    def epsilon(self, delta: float) -> float:
        """Return epsilon of all rounds together, by the smaller bound; see :class:`Shares`."""
        if self.rounds == 0:
            return 0.0
        samples = _SAMPLING_ERROR * self._coordinates
        rho = self.zcdp()
        bound = _with_sampling_error(delta, samples, lambda of: epsilon_of_zcdp(rho, of))
        noise, ratio = self.dominating_gaussian()
        if ratio >= 1:
            return bound
        multiplier = noise / math.sqrt(self.rounds)

        def dominated(of: float) -> float:
            return 2 * ratio + epsilon_of_gaussian(multiplier, of * math.exp(-ratio))

        return min(bound, _with_sampling_error(delta, samples, dominated))


class SkellamShares(Shares):
    """Shares of Skellam noise; for the arguments see :class:`Shares`."""

    def renyi(self, order: float) -> float:
        """Return the Rényi divergence of all rounds at a whole order above 1."""
        squared, variance = self.squared_sensitivity, self.variance
        norm1 = min(math.sqrt(self.dimension * squared), squared)
        first = ((2 * order - 1) * squared + 6 * norm1) / (4 * variance * variance)
        return self.rounds * (order * squared / (2 * variance) + min(first, 1.5 * norm1 / variance))

    def epsilon(self, delta: float) -> float:
        """Return epsilon of all rounds together, at the best whole order; see :class:`Shares`."""
        if self.rounds == 0:
            return 0.0
        renyi = np.array([self.renyi(order) for order in _WHOLE_ORDERS.tolist()])
        samples = 2 * _SAMPLING_ERROR * self._coordinates  # of two Poisson variables each
        return _with_sampling_error(
            delta, samples, lambda of: epsilon_of_renyi(_WHOLE_ORDERS, renyi, of)
        )


def epsilon_of_renyi(orders: Reals, divergences: Reals, delta: float) -> float:
    """Return the best epsilon that Rényi divergences give (Canonne et al. 2020, proposition 12).

    Args:
        orders: ``[k]`` above 1.
        divergences: ``[k]``, at these orders.
        delta: Delta of the guarantee, in (0, 1).
    """
    rest = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(np.min(divergences + rest)))


def epsilon_of_zcdp(rho: float, delta: float) -> float:
    """Return the best epsilon of a rho-zCDP mechanism: its divergence at order a is rho a."""
    if rho == math.inf:
        return math.inf
    return epsilon_of_renyi(_ORDERS, rho * _ORDERS, delta)


def epsilon_of_gaussian(noise_multiplier: float, delta: float) -> float:
    """Return epsilon of the Gaussian mechanism (Balle, Wang 2018, theorem 8), rounded up.

    R of them with multiplier ``z`` cost what one with ``z / sqrt(R)`` costs, exactly.

    Args:
        noise_multiplier: Standard deviation over sensitivity.
        delta: Delta of the guarantee, in (0, 1).

    Returns:
        Epsilon; infinity beyond a million.
    """
    low, high = 0.0, 1.0
    while _delta_of_gaussian(noise_multiplier, high) > delta:
        high *= 2
        if high > _LARGEST_EPSILON:
            return math.inf
    if _delta_of_gaussian(noise_multiplier, 0.0) <= delta:
        return 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if _delta_of_gaussian(noise_multiplier, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def _delta_of_gaussian(noise: float, epsilon: float) -> float:
    above = _normal_below(0.5 / noise - epsilon * noise)
    below = _normal_below(-0.5 / noise - epsilon * noise)
    if below > 0:
        return above - math.exp(epsilon + math.log(below)) + 1e-15 * above
    return above


def _normal_below(at: float) -> float:
    return 0.5 * math.erfc(-at / math.sqrt(2))


def _log_ratio(variance: float) -> float:
    """Return ``log((1+k) / (1-k))`` for ``k(variance)``; infinity where k is 1 or more."""
    first = math.exp(-2 * math.pi**2 * variance)
    k = 2 * first / (1 - first**3)  # exponents are 1, 4, 9, ...: below a series of 1, 4, 7, ...
    return 2 * math.atanh(k) if k < 1 else math.inf


def _with_sampling_error(delta: float, samples: float, epsilon: Callable[[float], float]) -> float:
    """Return epsilon when samples have a total variation distance of ``samples`` to what they are.

    Being ``t`` off turns (epsilon, delta) into (epsilon, delta + (1 + exp(epsilon)) t).
    """
    for kept in (1e-6, 0.5):  # nearly always nothing is to be seen of it
        found = epsilon(delta * (1 - kept))
        if found < 600 and (1 + math.exp(found)) * samples <= kept * delta:
            return found
    return math.inf

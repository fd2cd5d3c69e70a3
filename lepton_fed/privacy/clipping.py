"""A clipping norm that follows a quantile of the updates' norms.

Each update carries one coordinate more: a public number ``s`` if its norm was above the round's
``C``, and 0 if it was not. The sum of these says how many were, and has the same noise as every
other coordinate. With ``b`` the fraction that was within ``C``, so far as the noise lets it be
known,::

    C <- C exp(-rate (b - quantile))

More updates within the norm than wanted make it smaller. The rate is public: it follows from the
quantile and from how large the noise is. An update and its coordinate together are
no longer than ``sqrt(C**2 + s**2)``, and ``s`` is at most so large that this is ``1.05 C``: the
count costs the sum 5 % more noise, and is itself off by about 3.4 times the noise multiplier.

The paper adds ``b - 1/2`` instead, which moves the count by half as much when a site comes or goes.
Here who takes part is public, and a neighbour is a site that sends zeros: an update of zeros has
the norm 0, so its coordinate is 0 as well, and the bound is that of the vector itself. That does
not depend on the norms of the rounds before, so a norm that follows from them costs nothing more.

References:
    G. Andrew, O. Thakkar, H. B. McMahan, S. Ramaswamy, "Differentially Private Learning with
    Adaptive Clipping", NeurIPS 2021, arXiv:1905.03871, algorithm 1 and section 3.
"""

from __future__ import annotations

import math

import numpy as np

from lepton_fed.config.privacy_rules import LEAST_CLIP
from lepton_fed.core.layout import Vector
from lepton_fed.core.norms import clipped

__all__ = ["COUNT_COST", "UNIT_STEPS", "counted", "fraction_within", "joint_norm", "moved", "unit"]

COUNT_COST = 1.05
"""Norm of an update and its coordinate together, over that of the update."""

UNIT_STEPS = 128
"""On a grid of powers of two this fine beside the norm, the coordinate is exact."""

_RATIO = math.sqrt(COUNT_COST**2 - 1)
_UNIT_BITS = 7
_STRAYING = 0.5  # of the norm's logarithm, twice as far as noise alone takes it
_LEAST_DEVIATION = 1e-9
_MOST_STEP = 1.0  # of the norm's logarithm in a round: noise on few sites moves it no further


def joint_norm(clip: float) -> float:
    """Return the largest norm of an update of at most ``clip`` together with its coordinate."""
    return COUNT_COST * clip


def unit(clip: float) -> float:
    """Return what an update adds to the count whose norm is above ``clip``.

    It is a small multiple of a power of two that is no smaller than ``clip / UNIT_STEPS``: the same
    number in float32, and on a grid of a ring that is as fine.
    """
    step = math.ldexp(1.0, math.frexp(clip)[1] - _UNIT_BITS)
    return math.floor(_RATIO * clip / step) * step


def counted(update: Vector, clip: float, *, over: bool) -> Vector:
    """Return an update, clipped, and the coordinate that counts it.

    Args:
        update: ``[n]`` float32, finite.
        clip: The round's norm.
        over: Whether its norm was above that, before anybody clipped it.

    Returns:
        ``[n + 1]`` float32, of norm ``joint_norm(clip)`` at most.
    """
    short, _ = clipped(update, clip)
    return np.append(short, np.float32(unit(clip) if over else 0.0))


def fraction_within(count: float, clip: float) -> float:
    """Return the fraction of a round's updates that were within the norm.

    Args:
        count: Mean of their coordinates, noised.
        clip: The round's norm.
    """
    return 1.0 - count / unit(clip)


def moved(
    clip: float, within: float, quantile: float, *, deviation: float, least: float, most: float
) -> float:
    """Return the norm of the next round.

    Its logarithm moves so fast that the norm can shrink and grow by 10 % in a round at least: by
    0.2 for a fraction of one at the median, as in the paper, and by more at other quantiles, which
    would take hundreds of rounds otherwise. What noise makes it move, the quantile has to bring
    back. Where noise is large beside the quantile's distance from 0 and 1 the norm moves slower,
    as the variance of the noise grows, and so strays by a factor of two or so; it would stray by
    hundreds. In one round its logarithm moves at most by one.

    Args:
        clip: The round's norm.
        within: :func:`fraction_within`; beyond 0 and 1 where the noise is.
        quantile: Fraction that shall be within, in (0, 1).
        deviation: Standard deviation of the noise on ``within``.
        least: Smallest norm.
        most: Largest norm.
    """
    room = min(quantile, 1.0 - quantile)
    # Random steps of `rate * deviation`, and a drift of `rate * room` at most that brings it back:
    # the logarithm strays as far as the first squared over twice the second.
    rate = min(0.1 / room, _STRAYING * room / max(deviation, _LEAST_DEVIATION) ** 2)
    step = min(max(-rate * (within - quantile), -_MOST_STEP), _MOST_STEP)
    return min(max(clip * math.exp(step), least, LEAST_CLIP), most)

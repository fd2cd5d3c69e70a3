"""What one training run proves of epsilon: the one-run audit.

T. Steinke, M. Nasr, M. Jagielski: Privacy Auditing with One (1) Training Run. NeurIPS 2023.
arXiv:2305.08846, theorem 5.2 and appendix D. Each of m canaries is in the data with probability one
half. Somebody who sees what left guesses of r of them whether they were in. If the training is
(epsilon, delta)-DP towards adding or removing a record, the number of right guesses is hardly ever
above that of r coins that show heads with probability e^epsilon / (1 + e^epsilon).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LowerBound", "epsilon_proved", "lower_bound", "p_value"]

_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the canaries that are guessed about
_LARGEST = 60.0
_PRECISION = 1e-3


@dataclass(frozen=True)
class LowerBound:
    """What the guesses prove.

    Args:
        epsilon: Epsilon is at least this, with the confidence asked for.
        confidence: Probability with which a run of which this is false is not said to have it.
        canaries: Canaries, in the data and not.
        guesses: How many of them were guessed about.
        right: How many guesses were right.
    """

    epsilon: float
    confidence: float
    canaries: int
    guesses: int
    right: int


def lower_bound(
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    delta: float,
    confidence: float = 0.95,
) -> LowerBound:
    """Return the best lower bound on epsilon over several numbers of guesses.

    Half of the guesses are "in", for the highest scores, and half "out", for the lowest. How many
    is best depends on epsilon, so several numbers are tried; each has its part of the probability
    of error (Bonferroni), so that the choice costs no confidence.

    Args:
        scores: ``[m]``: the higher, the more the canary looks as if it was in the data.
        included: ``[m]``: whether it was; each an independent fair coin.
        delta: Delta of the claim.
        confidence: Probability with which the bound is true.
    """
    order = np.argsort(scores)
    best = LowerBound(0.0, confidence, len(scores), 0, 0)
    for share in _SHARES:
        half = max(1, int(share * len(scores) / 2))
        right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        proved = epsilon_proved(
            len(scores), 2 * half, right, delta, (1.0 - confidence) / len(_SHARES)
        )
        if proved >= best.epsilon:
            best = LowerBound(proved, confidence, len(scores), 2 * half, right)
    return best


def epsilon_proved(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Return the largest epsilon that the guesses refute; 0 if they refute none.

    Args:
        canaries: Canaries, in the data and not.
        guesses: How many were guessed about.
        right: How many guesses were right.
        delta: Delta of the claim.
        error: Probability of refuting an epsilon that is true.
    """
    low, high = 0.0, _LARGEST
    if p_value(canaries, guesses, right, low, delta) > error:
        return 0.0
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        if p_value(canaries, guesses, right, middle, delta) > error:
            high = middle
        else:
            low = middle
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the most probable that so many right guesses are, under (epsilon, delta)-DP.

    Args:
        canaries: Canaries, in the data and not.
        guesses: How many were guessed about.
        right: How many guesses were right.
        epsilon: Epsilon that is tried.
        delta: Delta that goes with it.

    Returns:
        ``P[W >= right] + 2 m delta max_i P[right > W >= right - i] / i`` for W binomial of
        ``guesses`` coins with probability ``e^epsilon / (1 + e^epsilon)``; at most 1.

    Example:
        >>> round(p_value(100, 100, 100, 0.0, 0.0) * 2**100, 6)
        1.0
    """
    chances = _binomial(guesses, 1.0 / (1.0 + math.exp(-epsilon)))
    beta = float(chances[right:].sum())
    # P[right > W >= right - i] for i = 1 ... right.
    below = np.cumsum(chances[:right][::-1])
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2.0 * canaries * delta * alpha)


def _binomial(count: int, chance: float) -> npt.NDArray[np.float64]:
    """Return the probabilities of 0 ... ``count`` heads, ``[count + 1]``."""
    heads = np.arange(count + 1)
    ways = np.array([math.lgamma(k + 1) + math.lgamma(count - k + 1) for k in range(count + 1)])
    other = max(1.0 - chance, 1e-300)  # a chance may round to 1
    logs = math.lgamma(count + 1) - ways + heads * math.log(chance)
    chances: npt.NDArray[np.float64] = np.exp(logs + (count - heads) * math.log(other))
    return chances

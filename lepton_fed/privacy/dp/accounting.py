"""What DP-SGD costs: privacy loss distributions over the events that were really run.

Accounting is by PLD (Koskela, Jälkö, Honkela, AISTATS 2020; Doroshenko et al., PoPETs 2022) as
Google's dp-accounting implements it, with pessimistic rounding: the number is never below the
truth. Rényi DP (Mironov, CSF 2017) is computed beside it: it is looser by nature, so a PLD above it
is a fault, and refused. Gaussian DP is not used: its central limit theorem is no bound.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lepton_fed.errors import Problem, RunError, TaskError
from lepton_fed.privacy.dp.events import (
    ADJACENCY,
    ROUNDED,
    ZERO_OUT,
    CorrelatedGaussian,
    Event,
    OrderedGaussian,
    SampledGaussian,
    event_of,
)

__all__ = [
    "ADJACENCY",
    "GRIDS",
    "LARGEST_NOISE",
    "ZERO_OUT",
    "CorrelatedGaussian",
    "Event",
    "Guarantee",
    "OrderedGaussian",
    "SampledGaussian",
    "adjacency_of",
    "epsilon_of",
    "event_of",
    "guarantee_of",
    "noise_multiplier_for",
    "terms",
]

GRIDS = (1e-3, 2e-4, 1e-4, 1e-5)
"""Grids of the discretised privacy loss; the result is an upper bound at each of them."""

_COARSE = 0.01  # largest share of the losses' variance that rounding to the grid may add
_MOST_POINTS = 2_000_000  # of a grid: beyond, a composition takes many seconds
_TOLERANCE = 1e-3  # relative, of the noise multiplier
_BEYOND = 0.4  # of the tolerance: so far from where a line meets the target the next look is
_MIDDLE = 4  # every so many looks are in the middle, whatever the line says
_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024, 4096)
LARGEST_NOISE = 1e4
"""The largest noise multiplier that is looked for."""


@dataclass(frozen=True)
class Guarantee:
    """What events cost, with all that the number depends on.

    Args:
        epsilon: By PLD, at ``delta`` and ``adjacency``; infinity without noise.
        delta: Delta of the guarantee.
        adjacency: Which data sets are neighbours: ``add-or-remove-one`` record, or ``zero-out-one``
            record (its place stays, empty) where a sampler goes by an order.
        samplers: The samplers that ran, by name.
        grid: Grid of the discretised privacy loss.
        replace_one: Epsilon when a neighbour has another record in the place of one.
        rdp: Epsilon by Rényi DP: the cross-check, never smaller.
    """

    epsilon: float
    delta: float
    adjacency: str
    samplers: tuple[str, ...]
    grid: float
    replace_one: float
    rdp: float


def adjacency_of(sampler: str) -> str:
    """Return which data sets are neighbours for what a sampler's events cost.

    Args:
        sampler: Its name.
    """
    return ADJACENCY if sampler == SampledGaussian.sampler else ZERO_OUT


def terms(sampler: str, delta: float, mechanism: str = "dp_sgd") -> str:
    """Return what an epsilon of a run depends on, in words, for whoever keeps the bare number.

    Args:
        sampler: The sampler of the run.
        delta: Delta of the guarantee.
        mechanism: The mechanism of the run.

    Example:
        >>> terms("shuffled", 1e-5)
        'delta 1e-05, zero-out-one, shuffled sampler, PLD at grid 0.001 or finer'
    """
    adjacency = adjacency_of(sampler)
    noise = "" if mechanism == "dp_sgd" else f" with correlated noise ({mechanism})"
    return (
        f"delta {delta:g}, {adjacency}, {sampler} sampler{noise}, PLD at grid {GRIDS[0]:g} or finer"
    )


_Merged = tuple[tuple[tuple[float, float], int], ...]


def epsilon_of(events: Iterable[Event], delta: float) -> float:
    """Return the epsilon that all events together cost at ``delta``.

    Its adjacency is the events': :func:`guarantee_of` tells it.

    Args:
        events: What was run, in any order.
        delta: Delta of the guarantee.

    Returns:
        Epsilon; 0 for no steps, infinity without noise.
    """
    return _epsilon(_merged(events), delta, ADJACENCY)


def guarantee_of(events: Iterable[Event], delta: float) -> Guarantee:
    """Return what all events together cost, cross-checked and with what the number depends on.

    Args:
        events: What was run, in any order.
        delta: Delta of the guarantee.

    Raises:
        RunError: LF3310, Rényi DP proves less than PLD does: one of the two is wrong.
    """
    known = [event for event in events if event.steps]
    merged = _merged(known)
    epsilon = _epsilon(merged, delta, ADJACENCY)
    rdp = _rdp(merged, delta)
    if epsilon > rdp * 1.01 + 0.005 or not rdp >= 0:
        raise RunError(
            Problem(
                "LF3310",
                f"the accountants contradict each other: epsilon is {epsilon:.4g} by PLD, and at "
                f"most {rdp:.4g} by Rényi DP, at delta {delta:g}",
                key="privacy.record",
                remedy="do not train with this; report the conf and the version of dp-accounting",
            )
        )
    return Guarantee(
        epsilon,
        delta,
        ZERO_OUT if any(event.adjacency == ZERO_OUT for event in known) else ADJACENCY,
        tuple(sorted({event.sampler for event in known})),
        _grid(merged),
        _epsilon(merged, delta, "replace-one"),
        rdp,
    )


def _merged(events: Iterable[Event]) -> _Merged:
    """Return equal Gaussians counted, and all that no sampling amplifies as one.

    Gaussians compose to a Gaussian whose inverse squared noise multiplier is the sum of theirs,
    whatever the neighbours: hundreds of different ones take no longer than one, and are rounded
    once. What is rounded on the way costs more, never less.
    """
    merged: Counter[tuple[float, float]] = Counter()
    correlated = []
    for event in events:
        if isinstance(event, CorrelatedGaussian):
            correlated.append(event.inverse_square)
            continue
        noise, rate, times = event.parts()
        merged[noise, rate] += times
    kept = [(key, times) for key, times in merged.items() if times]
    whole = [(noise, times) for (noise, rate), times in kept if rate >= 1]
    if len(whole) > 1 or any(correlated):
        squares = [times / noise**2 if noise > 0 else math.inf for noise, times in whole]
        noise = ROUNDED / math.sqrt(math.fsum([*squares, *correlated]))
        kept = [(key, times) for key, times in kept if key[1] < 1] + [((noise, 1.0), 1)]
    return tuple(sorted(kept))


@lru_cache(maxsize=4096)
def _epsilon(merged: _Merged, delta: float, adjacency: str) -> float:
    if not merged:
        return 0.0
    if any(noise <= 0 for (noise, _), _ in merged):
        return math.inf
    grid = _grid(merged)
    composed: Any = None
    for (noise, rate), times in merged:
        if rate >= 1:  # Gaussians compose to a Gaussian
            part = _losses(noise / math.sqrt(times), 1.0, grid, adjacency)
        else:
            part = _losses(noise, rate, grid, adjacency).self_compose(times)
        composed = part if composed is None else composed.compose(part)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _losses(noise: float, rate: float, grid: float, adjacency: str) -> Any:
    """Return the distribution of one step's privacy loss."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    # An empty place adds nothing to a sum, as a record that is not there.
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if adjacency == "replace-one":
        relation = NeighboringRelation.REPLACE_ONE
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        value_discretization_interval=grid,
        sampling_prob=rate,
        neighboring_relation=relation,
    )


@lru_cache(maxsize=4096)
def _grid(merged: _Merged) -> float:
    """Return the coarsest grid that the losses of these steps are not lost in.

    Rounding a loss to the ends of its cell adds to its variance. Where a step's losses are smaller
    than a cell, that is most of it: at a grid of 1e-3, 100,000 steps at rate 0.001 and noise 10
    would be told three times what they cost.
    """
    parts = [_moments(noise, rate, times) for (noise, rate), times in merged if noise > 0]
    variance = sum(times * float(weights @ losses**2) for times, losses, weights in parts)
    widest = variance + 10.0 * math.sqrt(variance)
    chosen = GRIDS[0]
    for grid in GRIDS:
        if widest / grid > _MOST_POINTS:
            break
        chosen = grid
        added = 0.0
        for times, losses, weights in parts:
            within = losses / grid - np.floor(losses / grid)
            added += times * grid**2 * float(weights @ (within * (1.0 - within)))
        if added <= _COARSE * variance:
            break
    return chosen


def _moments(noise: float, rate: float, times: int) -> tuple[int, Any, Any]:
    """Return how many steps there are, and losses of one, ``[n]`` with weights that sum to 1."""
    if rate >= 1:
        noise, times = noise / math.sqrt(times), 1
    points = np.linspace(-6.0, 6.0, 601)
    weights = np.exp(-(points**2) / 2.0)
    likelihood = np.minimum((2.0 * noise * points - 1.0) / (2.0 * noise**2), 700.0)
    # Of all records the loss is the logarithm itself, which may lie below what a likelihood can.
    losses = likelihood if rate >= 1 else np.log1p(rate * np.expm1(likelihood))
    return times, losses, weights / weights.sum()


@lru_cache(maxsize=256)
def _rdp(merged: _Merged, delta: float) -> float:
    if not merged:
        return 0.0
    if any(noise <= 0 for (noise, _), _ in merged):
        return math.inf
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(_ORDERS)
    for (noise, rate), times in merged:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        event = gaussian if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(event, times)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, event: Event) -> float:
    """Return the smallest noise multiplier with which an event costs at most ``epsilon``.

    Args:
        epsilon: Target for the whole run.
        delta: Delta of the guarantee.
        event: The whole run; its own noise multiplier does not matter.

    Returns:
        The noise multiplier, at most 0.1 % above the smallest one; never one that costs more.

    Raises:
        TaskError: No reasonable amount of noise reaches the target.
    """

    def cost(noise: float) -> float:
        return epsilon_of([replace(event, noise_multiplier=noise)], delta)

    _, rate, times = event.parts()
    # By the central limit theorem less noise than this costs more, and little noise takes long to
    # account for: its losses are large.
    high = max(1.0, rate * math.sqrt(times) / epsilon)
    while high <= LARGEST_NOISE and cost(high) > epsilon:
        high *= 2.0
    if high > LARGEST_NOISE:
        raise TaskError(
            Problem(
                "LF3301",
                f"{event.steps} steps at sampling rate {event.sampling_rate:g} cannot stay within "
                f"epsilon {epsilon:g} at delta {delta:g}",
                key="privacy.record.epsilon",
                remedy="fewer rounds or epochs, smaller batches, or a larger epsilon",
            )
        )
    low = high / 2.0
    while cost(low) <= epsilon and low > 1e-2:
        high, low = low, low / 2.0
    return _narrowed(low, high, epsilon, cost)


def _narrowed(low: float, high: float, epsilon: float, cost: Callable[[float], float]) -> float:
    """Return a noise multiplier that costs at most ``epsilon``, 0.1 % above one that costs more.

    Costs are dear to compute, and nearly straight on logarithmic axes: so the line through both
    ends tells where to look. A little beyond it, on the side of the end that is farther off: then
    both ends close in. Where it misleads, the middle is as good as ever.

    Args:
        low: One that costs more.
        high: One that does not.
        epsilon: Target.
        cost: Returns what a noise multiplier costs; may be infinite.
    """
    left, right = cost(low), cost(high)
    beyond, was_left = _BEYOND * _TOLERANCE, False
    for turn in itertools.count(1):
        if high / low <= 1.0 + _TOLERANCE:
            return high
        width = math.log(high / low)
        at = 0.5 * width
        if turn % _MIDDLE and 0 < right < left < math.inf:
            at = width * math.log(left / epsilon) / math.log(left / right)
            at = at + beyond if at < 0.5 * width else at - beyond
            at = min(max(at, _BEYOND * _TOLERANCE), width - _BEYOND * _TOLERANCE)
        middle = low * math.exp(at)
        found = cost(middle)
        is_left = found > epsilon
        if is_left:
            low, left = middle, found
        else:
            high, right = middle, found
        # Twice the same end: the line is not straight enough to look so near.
        beyond = 2.0 * beyond if is_left is was_left else _BEYOND * _TOLERANCE
        was_left = is_left
    raise AssertionError  # never: it counts on

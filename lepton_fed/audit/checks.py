"""An audit's checks: what was seen of a training, held against what it claims."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lepton_fed.audit.claims import Claims, SiteClaim
from lepton_fed.audit.contribution import Contribution
from lepton_fed.audit.lower_bound import LowerBound
from lepton_fed.audit.mechanism import composed
from lepton_fed.audit.report import Check
from lepton_fed.audit.training import Watched
from lepton_fed.privacy.dp.accounting import epsilon_of

__all__ = ["check_accounting", "check_bound", "check_contribution", "check_noise"]

_NOISE = 0.05
_FLOAT32 = 1e-5
_ROUNDING = 1e-3  # of an epsilon
_SIGMAS = 5.0  # an honest training is found fault with once in a million audits
_MARKED = 0.5  # of a clipped gradient: without noise it is there whole, or not at all


def check_noise(watched: Watched) -> Check:
    """Hold the noise on canaries that were not in the data against the configured noise.

    Nothing but noise ever reaches their weights. Three things must be right: the noise of all
    steps; that of the step with the least; and that of their sum, which shows noise that is the
    same in two steps. Where sites share the noise, so must be that of each site's share.
    """
    alone = watched.fresh[:, ~watched.included]
    steps, absent = alone.shape
    configured = watched.noise
    found = float(np.sqrt(np.mean(alone**2)))
    error = found / math.sqrt(2.0 * alone.size)
    least = float(np.sqrt(np.mean(alone**2, axis=1)).min()) / configured
    summed = float(np.sqrt(np.mean(alone.sum(axis=0) ** 2) / steps)) / configured
    # The least of many steps lies below the mean by chance alone.
    slack = _SIGMAS / math.sqrt(2.0 * absent)
    reasons = []
    if abs(found / configured - 1.0) > _NOISE:
        reasons.append(f"more than {_NOISE:.0%} off")
    if least < 1.0 - slack:
        reasons.append(f"one step has {least:.2f} of it")
    if abs(summed - 1.0) > slack:
        reasons.append(f"all steps together have {summed:.2f} of it: they are not independent")
    what = (
        f"{found:.4g} (standard error {error:.2g}) of {configured:.4g} configured, "
        f"from {absent} canaries that were not in the data"
    )
    numbers = {
        "configured": configured, "estimated": found, "standard_error": error,
        "least_step": least, "summed": summed, "absent": absent,
    }  # fmt: skip
    if len(watched.shares):
        what += f"; in the sum of {len(watched.shares)} shares"
        reasons += _shares(watched, numbers)
    return Check("noise", not reasons, "; ".join([what, *reasons]), numbers)


def _shares(watched: Watched, numbers: dict[str, float]) -> list[str]:
    """Say what is wrong with the shares of single sites, and note their sizes."""
    sites, steps = watched.shares.shape
    absent = int((~watched.included).sum())
    expected = watched.noise / math.sqrt(sites)
    found = np.sqrt(np.mean(watched.shares**2, axis=1)) / expected
    numbers |= {
        "shares": sites, "least_share": float(found.min()), "largest_share": float(found.max())
    }  # fmt: skip
    allowed = max(_NOISE, _SIGMAS / math.sqrt(2.0 * steps * absent))
    return [
        f"site {number} adds {one:.2f} of its share"
        for number, one in enumerate(found, start=1)
        if abs(one - 1.0) > allowed
    ]


def check_contribution(largest: Contribution, watched: Watched) -> Check:
    """Hold the largest contribution of a record against the clipping norm.

    Args:
        largest: Of records of all kinds.
        watched: What canaries gave to steps without noise.
    """
    canary = float(np.abs(watched.silent).max(initial=0.0))
    norm = max(largest.norm, canary)
    passed = norm <= 1.0 + _FLOAT32
    what = f"at most {norm:.8g} of the clipping norm, in {largest.tried} trials without noise"
    if not passed:
        what += f": a record that is {largest.record}, weights {largest.weights}"
        what = what.replace("at most", "up to")
    numbers = {"norm": min(norm, 1e300), "canary": canary, "tried": largest.tried}
    if largest.rounded is not None:
        what += f"; of the rounded sum {largest.rounded:.4g} of what is accounted for"
        numbers["rounded"] = largest.rounded
        passed = passed and largest.rounded <= 1.0
    return Check("contribution", passed, what, numbers)


def check_bound(bound: LowerBound, watched: Watched) -> Check:
    """Hold what a guesser proves of epsilon against what is claimed."""
    passed = bound.epsilon <= watched.claimed
    what = (
        f"epsilon is at least {bound.epsilon:.2f} with {bound.confidence:.0%} confidence "
        f"({bound.right} of {bound.guesses} guesses right); claimed {watched.claimed:.2f}"
    )
    numbers = {
        "proved": bound.epsilon, "claimed": watched.claimed, "guesses": bound.guesses,
        "right": bound.right, "confidence": bound.confidence,
    }  # fmt: skip
    return Check("bound", passed, what, numbers)


def check_accounting(watched: Watched, claims: Claims) -> Check:
    """Hold what was claimed, here and in the run, against what was done.

    Args:
        watched: The audited training: its steps are counted, its sampling is measured.
        claims: The run's own claims, and its ledgers.
    """
    did = composed(watched.mechanism, watched.delta)
    reasons = _sampling(watched)
    steps = len(watched.noised)
    if steps != watched.mechanism.steps * watched.mechanism.rounds:
        reasons.append(f"{steps} steps were taken, not those that were charged")
    if watched.claimed < did * (1.0 - _ROUNDING):
        reasons.append(f"the audited training claims {watched.claimed:.4g} for {did:.4g}")
    spent: list[float] = []
    for site in claims.sites:
        reasons += _of_site(site, claims, spent)
    if spent:
        what = f"the ledgers give epsilon {max(spent):.4g}, {_said(claims.sites)}"
    else:
        what = f"the ledgers are at the sites; the run says {_said(claims.sites)}"
    what += f"; audited: {watched.claimed:.4g} claimed for {did:.4g}"
    numbers = {"composed": did, "claimed": watched.claimed, "steps": steps}
    if spent:
        numbers["ledgers"] = max(spent)
    return Check("accounting", not reasons, "; ".join([what, *reasons]), numbers)


def _sampling(watched: Watched) -> list[str]:
    """Say what is wrong with which canaries were in which step."""
    if watched.mechanism.sampler != "poisson":
        return _order(watched)
    return _poisson(watched)


def _order(watched: Watched) -> list[str]:
    """Say what is wrong with the batches of an order: a record is in one of each pass."""
    taken = watched.silent[:, watched.included] > _MARKED
    length = watched.mechanism.steps_a_pass
    for begun in range(0, len(taken), length):
        times = taken[begun : begun + length].sum(axis=0)
        if times.max(initial=0) > 1:
            return [f"a record was in {times.max()} steps of one pass, one is charged"]
        if begun + length <= len(taken) and times.min(initial=1) < 1:
            return ["a record was in no step of a pass"]
    return []


def _poisson(watched: Watched) -> list[str]:
    """Say what is wrong with Poisson samples.

    Their rate must be the one that is accounted; and under Poisson sampling how often each was
    taken is binomial, while rows that are shuffled or taken in turn come up equally often.
    """
    taken = watched.silent[:, watched.included] > _MARKED
    rate, (steps, present) = watched.mechanism.rate, taken.shape
    spread = rate * (1.0 - rate)
    measured = float(taken.mean())
    if abs(measured - rate) > _SIGMAS * math.sqrt(spread / taken.size) + 1e-9:
        return [f"records are in a step with probability {measured:.4g}, not {rate:.4g}"]
    if spread * steps * present < _FEW:
        return []
    relative = float(np.var(taken.sum(axis=0))) / (steps * spread)
    # Of few expected picks the variance itself varies more than a Gaussian's.
    chance = math.sqrt((2.0 + 1.0 / (steps * spread)) / present)
    if abs(relative - 1.0) > _SIGMAS * chance:
        return [f"how often each was taken has {relative:.2f} of Poisson sampling's variance"]
    return []


_FEW = 100.0


def _of_site(site: SiteClaim, claims: Claims, spent: list[float]) -> list[str]:
    """Say what is wrong with a site's claim, and note what its ledger adds up to."""
    reasons = []
    agreed, delta = claims.record.epsilon, claims.record.delta
    if site.epsilon is not None and site.epsilon > agreed * (1.0 + _ROUNDING):
        reasons.append(f"{site.name} spent {site.epsilon:.4g}, {agreed:.4g} was agreed to")
    if site.charged is None:
        return reasons
    if len(site.charged) < site.rounds:
        reasons.append(
            f"{site.name} took part in {site.rounds} rounds and charged {len(site.charged)}"
        )
    others = {event.sampler for event in site.charged} - {claims.record.sampler}
    if others:
        reasons.append(
            f"{site.name} charged for the {min(others)} sampler, {claims.record.sampler} was "
            "agreed to"
        )
    found = epsilon_of(site.charged, delta)
    spent.append(found)
    if site.epsilon is not None and site.epsilon < found * (1.0 - _ROUNDING):
        reasons.append(f"{site.name} claims {site.epsilon:.4g}, its ledger gives {found:.4g}")
    if found > agreed * (1.0 + _ROUNDING):
        reasons.append(f"{site.name}'s ledger gives {found:.4g}, {agreed:.4g} was agreed to")
    return reasons


def _said(sites: Sequence[SiteClaim]) -> str:
    said = [site.epsilon for site in sites if site.epsilon is not None]
    return f"at most {max(said):.4g} is claimed" if said else "nothing is claimed"

"""An audit's checks: what was seen of a training, held against what it claims."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lepton_fed.audit.canaries import LEADING
from lepton_fed.audit.claims import Claims, SiteClaim
from lepton_fed.audit.contribution import Contribution
from lepton_fed.audit.lower_bound import LowerBound
from lepton_fed.audit.mechanism import composed
from lepton_fed.audit.report import Check
from lepton_fed.audit.training import Watched
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.privacy.dp.events import CorrelatedGaussian, Event, charged_steps

__all__ = ["check_accounting", "check_bound", "check_contribution", "check_noise"]

_NOISE = 0.05
_FLOAT32 = 1e-5
_ROUNDING = 1e-3  # of an epsilon
_SIGMAS = 5.0  # an honest training is found fault with once in a million audits
_LEAST_COMPARED = 40  # numbers, of which a correlation is told
_MOST_NAMED = 3  # tensors with other noise
_MARKED = 0.5  # of a clipped gradient: without noise it is there whole, or not at all


def check_noise(watched: Watched) -> Check:
    """Hold the noise on canaries that were not in the data against the configured noise.

    Nothing but noise ever reaches their weights. Six things must be right: the noise of all steps;
    that of the step with the least; that of their sum, which shows noise that is a little the same
    in many steps; that no two steps have much in common, as when one takes off what another added;
    the noise of each tensor of the run's own; and that no two tensors have the same. Where sites
    share the noise, so must be that of each site's share.
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
    common, pair = _common(alone)
    if abs(common) > _chance_of_pairs(steps, absent):
        reasons.append(f"steps {pair[0]} and {pair[1]} have a correlation of {common:.2f}")
    elsewhere, wrong = _elsewhere(watched)
    reasons += [*wrong, *_repeated(watched)]
    what = (
        f"{found:.4g} (standard error {error:.2g}) of {configured:.4g} configured, "
        f"from {absent} canaries that were not in the data"
    )
    numbers = {
        "configured": configured, "estimated": found, "standard_error": error,
        "least_step": least, "summed": summed, "absent": absent, "correlation": abs(common),
        "tensors": len(elsewhere), "least_tensor": min(elsewhere, default=1.0),
    }  # fmt: skip
    if len(watched.shares):
        what += f"; in the sum of {len(watched.shares)} shares"
        reasons += _shares(watched, numbers)
    return Check("noise", not reasons, "; ".join([what, *reasons]), numbers)


def _common(alone: npt.NDArray[np.float64]) -> tuple[float, tuple[int, int]]:
    """Return the correlation of the two steps that have most in common, and which, from 1."""
    steps, absent = alone.shape
    if steps < 2 or absent < 2:
        return 0.0, (0, 0)
    unit = alone / np.maximum(np.linalg.norm(alone, axis=1, keepdims=True), 1e-300)
    found = np.triu(unit @ unit.T, 1)
    first, second = np.unravel_index(np.abs(found).argmax(), found.shape)
    return float(found[first, second]), (int(first) + 1, int(second) + 1)


def _chance_of_pairs(steps: int, absent: int) -> float:
    """Return the correlation that two of so many steps may have by chance.

    Args:
        steps: Steps.
        absent: Canaries that are looked at.
    """
    pairs = max(1.0, steps * (steps - 1) / 2)
    return math.sqrt((_SIGMAS**2 + 2.0 * math.log(pairs)) / max(1, absent))


def _elsewhere(watched: Watched) -> tuple[list[float], list[str]]:
    """Return the noise of each of the run's own tensors over the configured one, and what is wrong.

    Steps and elements are few in a small tensor, and tensors many.
    """
    found: list[float] = []
    reasons: list[str] = []
    sigmas = math.sqrt(_SIGMAS**2 + 2.0 * math.log(max(1, len(watched.elsewhere))))
    for name, noise in watched.elsewhere.items():
        found.append(float(np.sqrt(np.mean(noise**2))) / watched.noise)
        if abs(found[-1] - 1.0) > max(_NOISE, sigmas / math.sqrt(2.0 * noise.size)):
            reasons.append(f"tensor {name.removeprefix('model.')} has {found[-1]:.2f} of it")
    if len(reasons) > _MOST_NAMED:
        reasons[_MOST_NAMED:] = [f"so it is in {len(reasons) - _MOST_NAMED} more tensors"]
    return found, reasons


def _repeated(watched: Watched) -> list[str]:
    """Say which tensor begins with the noise of another: of the canaries', or the one before it."""
    shown = [("the canaries", np.where(watched.included, np.nan, watched.fresh)[:, :LEADING])]
    for name, noise in watched.elsewhere.items():
        own = noise[:, :LEADING]
        for before, other in {shown[0][0]: shown[0][1], shown[-1][0]: shown[-1][1]}.items():
            width = min(own.shape[1], other.shape[1])
            one, two = own[:, :width].ravel(), other[:, :width].ravel()
            both = np.isfinite(one + two)
            if both.sum() < _LEAST_COMPARED:
                continue
            found = _alike(one[both], two[both])
            if abs(found) > _chance_of_pairs(2 * len(watched.elsewhere), int(both.sum())):
                said = name.removeprefix("model.")
                return [f"tensor {said} has noise of {before} (correlation {found:.2f})"]
        shown.append((name.removeprefix("model."), own))
    return []


def _alike(one: npt.NDArray[np.float64], two: npt.NDArray[np.float64]) -> float:
    """Return the correlation of numbers whose mean is to be 0; 0 where there are none but 0."""
    size = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / size if size > 0 else 0.0


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
    steps = _fewer_steps(site.charged, claims, site.rounds)
    if steps:
        reasons.append(f"{site.name} charged {steps}")
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


def _fewer_steps(charged: Sequence[Event], claims: Claims, rounds: int) -> str:
    """Say where fewer steps were charged than rounds have; nothing where they are as many."""
    training = claims.agreement.task.training
    for event in charged:
        taken = 1 if claims.record.is_shared else training.steps
        if taken is None:
            a_pass = 1.0 / event.sampling_rate
            inexact = round(a_pass) if event.sampler == "poisson" else math.ceil(a_pass - 1e-6)
            taken = (training.epochs or 1) * max(1, inexact)
        if isinstance(event, CorrelatedGaussian):  # one that was charged before has none
            found = charged_steps(charged, event)
            if found < min(rounds * taken, event.planned):
                return f"{found} steps in {rounds} rounds of {taken}"
        elif event.steps < taken:
            return f"{event.steps} steps for a round of {taken}"
    return ""


def _said(sites: Sequence[SiteClaim]) -> str:
    said = [site.epsilon for site in sites if site.epsilon is not None]
    return f"at most {max(said):.4g} is claimed" if said else "nothing is claimed"

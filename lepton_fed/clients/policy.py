"""What a site's owner allows, held against what the coordinator offers.

The coordinator's words are never trusted to be sensible: every number is compared so that NaN and
infinities are refused, and no value makes the judge fail instead of saying no. An empty policy
allows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, time

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.privacy_rules import (
    client_problems,
    correlated_problems,
    shared_problems,
)
from lepton_fed.config.schema import LARGEST_CLIP, LEAST_CLIP, Budget, Policy
from lepton_fed.core.digests import digest_of
from lepton_fed.core.exchange import Reply
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, quoted
from lepton_fed.privacy.client import honest_sites
from lepton_fed.privacy.dp.events import MOST_CORRELATED_STEPS
from lepton_fed.privacy.dp.shared import honest_of

__all__ = ["allows_task", "filtered", "judge", "policy_digest", "within_hours"]

_SHORTEST_DIGEST = 12
_LARGEST_SHOWN = 2**63
_MOST_COHORT = 1_000_000


def policy_digest(policy: Policy, budget: Budget) -> str:
    """Return the digest under which receipts name a policy, 64 hexadecimal digits.

    Args:
        policy: What the owner allows.
        budget: What a record may cost; it belongs to what the owner allows.
    """
    return digest_of("lepton-fed policy 1", {"policy": policy, "budget": budget})


def judge(policy: Policy, budget: Budget, agreement: Agreement) -> list[Problem]:
    """Return every reason why a run is not allowed; none when it is.

    Of the hours only whether there are any: a run that is offered by day may train by night, and
    :func:`within_hours` is asked in every round.

    Args:
        policy: What the owner allows.
        budget: What a record may cost in the data set's life.
        agreement: What is offered.
    """
    return [
        *_form(agreement),
        *_task(policy, agreement),
        *_amounts(policy, agreement),
        *_privacy(policy, budget, agreement),
        *_secure_aggregation(policy, agreement),
        *_shared_noise(policy, agreement),
        *_client(policy, agreement),
        *_numbers(policy, agreement),
    ]


def allows_task(policy: Policy, digest: str, model: str) -> bool:
    """Return whether a task, by its digest, or its model, by its name, is allowed.

    Args:
        policy: What the owner allows.
        digest: The task's digest; empty for a task that has none.
        model: Name of the task's model.
    """
    by_digest = any(
        len(known) >= _SHORTEST_DIGEST and digest.startswith(known) for known in policy.tasks
    )
    return by_digest or model in policy.models


def within_hours(policy: Policy, now: datetime) -> bool:
    """Return whether training may begin now.

    Args:
        policy: What the owner allows; no hours mean never.
        now: Local time.
    """
    return any(_within(span, now.time()) for span in policy.hours)


def filtered(policy: Policy, reply: Reply) -> Reply:
    """Return a reply without the numbers that may not leave.

    Args:
        policy: What the owner allows.
        reply: What the site would say.
    """
    if "evaluation" not in policy.leaves:
        reply = replace(reply, counts=None)
    if "epsilon" not in policy.leaves:
        reply = replace(reply, epsilon=None, noise_multiplier=None)
    return reply


def _form(agreement: Agreement) -> Iterator[Problem]:
    """Refuse what no digest can be made of: nobody could be held to it afterwards."""
    if not _digest(agreement):
        yield Problem("LF4610", "the offer holds a value that no digest can be made of")


def _digest(thing: Agreement | Task) -> str:
    """Return the digest; empty where there is none: NaN, endless numbers or nests, half letters."""
    try:
        return thing.digest
    except (ValueError, TypeError, RecursionError):
        return ""


def _task(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    digest, model = _digest(agreement.task), agreement.task.model.name
    if not (policy.tasks or policy.models):
        yield Problem("LF4601", "this site's policy allows no task", key="policy.tasks")
    elif not allows_task(policy, digest, model):
        yield Problem(
            "LF4601",
            f"neither task {digest[:_SHORTEST_DIGEST] or 'without a digest'} nor model "
            f"{quoted(model)} is allowed at this site",
            key="policy.tasks",
        )
    strategy = agreement.strategy.name
    if strategy not in policy.strategies:
        yield Problem(
            "LF4602",
            f"strategy {quoted(strategy)} is not allowed at this site",
            key="policy.strategies",
        )


def _amounts(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    training = agreement.task.training
    asked = {
        "rounds": (agreement.rounds, policy.rounds),
        "batch_size": (training.batch_size, policy.batch_size),
    }
    if training.epochs is not None:
        asked["epochs"] = (training.epochs, policy.epochs)
    if training.steps is not None or training.epochs is None:
        asked["steps"] = (training.steps or 0, policy.steps)
    for name, (wanted, most) in asked.items():
        if not 0 < wanted <= most:
            yield Problem(
                "LF4603",
                f"{name}: {_shown(wanted)} asked for, at most {most} allowed at this site",
                key=f"policy.{name}",
            )
    if not policy.seconds_per_round > 0:
        yield Problem(
            "LF4604", "this site's policy allows no training time", key="policy.seconds_per_round"
        )
    if not policy.hours:
        yield Problem("LF4605", "this site's policy allows no hours", key="policy.hours")


def _privacy(policy: Policy, budget: Budget, agreement: Agreement) -> Iterator[Problem]:
    record, floor = agreement.privacy.record, policy.privacy
    if not record.enabled:
        if floor.record:
            yield Problem(
                "LF4606", "this site trains with record-level DP only", key="policy.privacy.record"
            )
        return
    if not (0 < record.epsilon <= floor.epsilon and record.epsilon < math.inf):
        yield Problem(
            "LF4607",
            f"epsilon {_shown(record.epsilon)} is asked for, at most {floor.epsilon:g} is allowed",
            key="policy.privacy.epsilon",
        )
    if not 0 < record.delta <= floor.delta:
        yield Problem(
            "LF4607",
            f"delta {_shown(record.delta)} is asked for, at most {floor.delta:g} is allowed",
            key="policy.privacy.delta",
        )
    if not record.epsilon <= budget.epsilon:
        yield Problem(
            "LF4608", "the run's epsilon is above the data set's budget", key="budget.epsilon"
        )
    if record.randomness != "system":
        yield Problem(
            "LF4618",
            "noise is to come from a seed, which whoever knows it can take off again; this site "
            "draws noise and batches from its own entropy only",
        )
    if not LEAST_CLIP <= record.clip <= LARGEST_CLIP:
        yield Problem("LF4607", f"{_shown(record.clip)} is no norm to clip gradients to")
    if record.engine not in ("hooks", "bookkeeping"):
        what = f"engine {str(record.engine)[:20]!r} holds no bound on what a record adds"
        yield Problem("LF4607", what)
    for problem in correlated_problems(agreement.privacy):
        yield replace(problem, code="LF4622")
    if record.mechanism not in ("dp_sgd", "dp_ftrl"):
        yield Problem("LF4622", f"no noise is called {str(record.mechanism)[:20]!r}")
    if record.band is not None and not 1 <= record.band <= MOST_CORRELATED_STEPS:
        yield Problem("LF4622", f"noise cannot be correlated over {_shown(record.band)} steps")
    if record.most_records is not None and not record.most_records >= 1:
        yield Problem("LF4607", f"{_shown(record.most_records)} records at once are none")


def _secure_aggregation(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    secure, floor = agreement.privacy.secure_aggregation, policy.privacy.secure_aggregation
    key = "policy.privacy.secure_aggregation"
    if not secure.enabled:
        if floor.required:
            yield Problem("LF4611", "this site's updates leave masked only", key=f"{key}.required")
        return
    if not secure.min_cohort >= floor.min_cohort:
        yield Problem(
            "LF4612",
            f"sums of {_shown(secure.min_cohort)} sites are asked for, at least "
            f"{floor.min_cohort} are to be in one",
            key=f"{key}.min_cohort",
        )
    if not floor.threshold <= secure.threshold <= 1:
        yield Problem(
            "LF4612",
            f"a threshold of {_shown(secure.threshold)} is asked for, at least "
            f"{floor.threshold:g} is to stay",
            key=f"{key}.threshold",
        )
    if floor.post_quantum and not secure.post_quantum:
        yield Problem(
            "LF4612", "keys are to be agreed on with ML-KEM-768 too", key=f"{key}.post_quantum"
        )
    if not (16 <= secure.bits <= 64 and 3 <= agreement.cohort <= _MOST_COHORT):
        yield Problem(
            "LF4612",
            f"no masked number of {_shown(secure.bits)} bits for {_shown(agreement.cohort)} sites",
        )


def _shared_noise(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    if not agreement.privacy.record.is_shared:
        return
    yield from (
        replace(problem, code="LF4620")
        for problem in shared_problems(agreement.task, agreement.privacy, agreement.cohort)
    )
    try:
        honest = honest_of(agreement)
    except (ValueError, OverflowError):
        yield Problem("LF4620", "shared noise: nothing says how many sites are counted on")
        return
    if not honest <= policy.privacy.honest * agreement.cohort:
        yield Problem(
            "LF4621",
            f"{_shown(honest)} of {_shown(agreement.cohort)} sites are counted on to add their "
            f"share of the noise; at most {policy.privacy.honest:g} of them may be",
            key="policy.privacy.honest",
        )


def _client(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    """Hold client-level DP against the floor; whether it is what it says, the site checks later."""
    client, floor = agreement.privacy.client, policy.privacy.client
    key = "policy.privacy.client"
    if client.enabled:
        yield from (
            replace(problem, code="LF4630")
            for problem in client_problems(agreement.task, agreement.privacy, agreement.cohort)
        )
    if not floor.epsilon > 0:
        return
    if not client.enabled:
        yield Problem("LF4631", "this site trains with client-level DP only", key=f"{key}.epsilon")
        return
    if not 0 < client.epsilon <= floor.epsilon:
        yield Problem(
            "LF4631",
            f"client-level epsilon {_shown(client.epsilon)} is asked for, at most "
            f"{floor.epsilon:g} is allowed",
            key=f"{key}.epsilon",
        )
    if not 0 < client.delta <= floor.delta:
        yield Problem(
            "LF4631",
            f"client-level delta {_shown(client.delta)} is asked for, at most {floor.delta:g} is "
            "allowed",
            key=f"{key}.delta",
        )
    if not client.is_shared:
        if not floor.trust_coordinator:
            yield Problem(
                "LF4631",
                "the coordinator is to add the noise, and this site does not trust it to",
                key=f"{key}.trust_coordinator",
            )
        return
    try:
        honest = honest_sites(agreement)
        within = honest <= policy.privacy.honest * agreement.cohort
    except (ValueError, OverflowError):
        yield Problem("LF4630", "client-level DP: nothing says how many sites are counted on")
        return
    if not within:
        yield Problem(
            "LF4621",
            f"{_shown(honest)} of {_shown(agreement.cohort)} sites are counted on to add their "
            f"share of the noise; at most {policy.privacy.honest:g} of them may be",
            key="policy.privacy.honest",
        )


def _numbers(policy: Policy, agreement: Agreement) -> Iterator[Problem]:
    if agreement.task.aggregation.weight == "rows" and "rows" not in policy.leaves:
        yield Problem(
            "LF4609", "the row count may not leave this site, as a weight either",
            key="policy.leaves",
        )  # fmt: skip
    outside = [n for n in agreement.privacy.outside_epsilon if n not in policy.leaves]
    if agreement.privacy.is_noised and outside:
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        yield Problem(
            "LF4609",
            f"{quoted(outside[0])}{more}: epsilon does not cover these numbers, and they may not "
            "leave this site",
            key="policy.leaves",
        )


def _shown(number: float) -> str:
    """Return a number of the coordinator's as text; one of endless digits only by name."""
    if isinstance(number, int):
        return str(number) if abs(number) < _LARGEST_SHOWN else "a number beyond 64 bits"
    return f"{number:g}"


def _within(span: str, now: time) -> bool:
    first, _, last = span.partition("-")
    try:
        start, end = _minutes(first), _minutes(last)
    except ValueError:
        return False  # what is no span allows nothing
    minute = 60 * now.hour + now.minute
    if start <= end:
        return start <= minute < end
    return minute >= start or minute < end


def _minutes(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return 60 * int(hours) + int(minutes)

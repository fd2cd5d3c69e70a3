"""Contradictions in what a run protects; keys are those of a server's or a simulation's conf."""

from __future__ import annotations

from collections.abc import Iterator

from lepton_fed.config.schema import Privacy
from lepton_fed.core.task import Schedule, Task
from lepton_fed.errors import Problem

__all__ = [
    "LEAST_CLIP",
    "client_problems",
    "correlated_problems",
    "record_problems",
    "shared_problems",
]

LEAST_CLIP = 2.0**-60
"""Smallest norm to which updates are clipped: their squares are far from where float32 ends."""

_MOST_BITS = {"discrete_gaussian": 32, "skellam": 28}


def record_problems(task: Task, privacy: Privacy) -> Iterator[Problem]:
    """Yield what does not go with record-level DP.

    Args:
        task: What is learned.
        privacy: What is protected.
    """
    if not privacy.record.enabled:
        return
    if task.aggregation.weight == "rows":
        yield Problem(
            "LF1046",
            "weights by row count tell the coordinator what record-level DP protects",
            key="task.aggregation.weight",
            remedy="set it to equal, or privacy.record.enabled to false",
        )
    if task.training.max_gradient_norm is not None:
        yield Problem(
            "LF1046",
            "record-level DP clips the gradient of every record already",
            key="task.training.max_gradient_norm",
            remedy="set it to null and privacy.record.clip to the norm",
        )


def correlated_problems(privacy: Privacy) -> Iterator[Problem]:
    """Yield what does not go with correlated noise.

    Args:
        privacy: What is protected.
    """
    record = privacy.record
    if not record.is_correlated:
        if record.band is not None:
            yield Problem(
                "LF1071",
                "only correlated noise has a band",
                key="privacy.record.band",
                remedy="set it to null, or privacy.record.mechanism to dp_ftrl",
            )
        return
    if record.sampler != "full":
        yield Problem(
            "LF1071",
            "correlated noise is accounted for an order that every record keeps its place in",
            key="privacy.record.sampler",
            remedy="set it to full, or privacy.record.mechanism to dp_sgd",
        )
    if record.noise != "site":
        yield Problem(
            "LF1071",
            "a share of the noise cannot take back what other sites added before",
            key="privacy.record.noise",
            remedy="set it to site, or privacy.record.mechanism to dp_sgd",
        )


def shared_problems(task: Task, privacy: Privacy, cohort: int) -> Iterator[Problem]:
    """Yield what does not go with shared noise.

    Whatever a site does with its gradient beside adding it to the sum, it would do with its share
    of the noise alone.

    Args:
        task: What is learned.
        privacy: What is protected.
        cohort: Most sites of a round; 0 where that is not known yet.
    """
    record, secure, training = privacy.record, privacy.secure_aggregation, task.training
    if not record.is_shared:
        return
    if not secure.enabled:
        yield _problem(
            "a share of the noise does not hide an update by itself",
            "privacy.secure_aggregation.enabled",
            "set it to true, or privacy.record.noise to site",
        )
    if secure.groups > 1:
        yield _problem(
            "sums of groups have a part of the noise each",
            "privacy.secure_aggregation.groups",
            "set it to 1",
        )
    if record.sampling_rate is None:
        yield _problem(
            "nothing says how many of its records a site draws",
            "privacy.record.sampling_rate",
            "set it, the same for all sites: 0.25",
        )
    if record.sampler != "poisson":
        yield _problem(
            "its epsilon is that of Poisson samples",
            "privacy.record.sampler",
            "set it to poisson",
        )
    if task.aggregation.weight_bound != 1:
        yield _problem(
            "what a site sends would be scaled by its weight, and its share of the noise would not",
            "task.aggregation.weight_bound",
            "set it to 1",
        )
    if cohort and record.honest > cohort:
        yield _problem(
            "more sites are counted on than a round has",
            "privacy.record.honest",
            "at most as many as are selected for a round",
        )
    if training.steps != 1 or training.epochs is not None:
        yield _problem(
            "a site's second step would start from what its own share covers alone",
            "task.training.steps",
            "set it to 1 and task.training.epochs to null; momentum and more steps are the "
            "coordinator's",
        )
    plain = training.optimiser == "sgd" and not training.momentum and not training.weight_decay
    if not plain or training.schedule != Schedule():
        yield _problem(
            "a site sends the gradient as it is: what follows it is the coordinator's part",
            "task.training.optimiser",
            "sgd without momentum, weight decay or schedule; set the strategy's",
        )
    if task.model.local:
        yield _problem(
            "tensors that stay at a site would be trained without noise",
            "task.model.local",
            "leave it empty",
        )


def client_problems(task: Task, privacy: Privacy, cohort: int) -> Iterator[Problem]:
    """Yield what does not go with client-level DP.

    Args:
        task: What is learned.
        privacy: What is protected.
        cohort: Most sites of a round; 0 where that is not known yet.
    """
    client, secure = privacy.client, privacy.secure_aggregation
    if not client.enabled:
        return
    if task.aggregation.weight != "equal":
        yield _client_problem(
            "a site of a large weight would have to be covered by more noise",
            "task.aggregation.weight",
            "set it to equal",
        )
    elif task.aggregation.weight_bound != 1:
        yield _client_problem(
            "updates would be scaled by their weight, and the norm they are clipped to would not",
            "task.aggregation.weight_bound",
            "set it to 1",
        )
    if not LEAST_CLIP <= client.clip <= task.aggregation.norm_bound:
        yield _client_problem(
            "updates are to be clipped to a norm that none of them may have",
            "privacy.client.clip",
            f"at least {LEAST_CLIP:.2g}, and at most task.aggregation.norm_bound",
        )
    if client.quantile is not None and not 0 < client.quantile < 1:
        yield _client_problem(
            "the norm is to follow no quantile",
            "privacy.client.quantile",
            "between 0 and 1, as 0.5 for the median; null for a norm that stays",
        )
    if privacy.record.is_shared:
        yield _client_problem(
            "the shares of record-level noise are made for another grid and another norm",
            "privacy.record.noise",
            "set it to site",
        )
    if secure.enabled and secure.groups > 1:
        yield _client_problem(
            "sums of groups have a part of the noise each",
            "privacy.secure_aggregation.groups",
            "set it to 1",
        )
    most = _MOST_BITS.get(client.mechanism, 0)
    if secure.enabled and not secure.bits <= most:
        yield _client_problem(
            f"noise is drawn for rings of at most {most} bits",
            "privacy.secure_aggregation.bits",
            f"{most} or fewer; 20 do for most models",
        )
    if client.is_shared:
        if not secure.enabled:
            yield _client_problem(
                "a share of the noise does not hide an update by itself",
                "privacy.secure_aggregation.enabled",
                "set it to true, or privacy.client.noise to coordinator",
            )
        if cohort and not 0 <= client.honest <= cohort:
            yield _client_problem(
                "more sites are counted on than take part in a round",
                "privacy.client.honest",
                "at most as many as a round has",
            )
        return
    if client.mechanism != "discrete_gaussian" or client.honest:
        key = "honest" if client.honest else "mechanism"
        yield _client_problem(
            "it says how sites share the noise, which the coordinator adds here",
            f"privacy.client.{key}",
            "leave it out, or set privacy.client.noise to shared",
        )


def _client_problem(what: str, key: str, remedy: str) -> Problem:
    return Problem("LF1080", f"client-level DP: {what}", key=key, remedy=remedy)


def _problem(what: str, key: str, remedy: str) -> Problem:
    return Problem("LF1070", f"shared noise: {what}", key=key, remedy=remedy)

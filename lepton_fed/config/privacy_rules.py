"""Contradictions in what a run protects; keys are those of a server's or a simulation's conf."""

from __future__ import annotations

from collections.abc import Iterator

from lepton_fed.config.schema import Privacy
from lepton_fed.core.task import Schedule, Task
from lepton_fed.errors import Problem

__all__ = ["record_problems", "shared_problems"]


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
    if cohort and record.honest > cohort:
        yield _problem(
            f"{record.honest} of {cohort} sites of a round cannot be counted on",
            "privacy.record.honest",
            f"at most {cohort}",
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


def _problem(what: str, key: str, remedy: str) -> Problem:
    return Problem("LF1070", f"shared noise: {what}", key=key, remedy=remedy)

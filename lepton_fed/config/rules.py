"""Contradictions: what is wrong with a conf whose every single value is right.

Each rule is a pure function from a part of the conf to problems that name a key; :mod:`.load` adds
the key's place. Keys of a task are relative to it, so that a task can be judged by itself.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from lepton_fed.config import plugins
from lepton_fed.config.data_rules import data_problems, distinct
from lepton_fed.config.nearest import did_you_mean
from lepton_fed.config.plugins import Group
from lepton_fed.config.privacy_rules import (
    client_problems,
    correlated_problems,
    record_problems,
    shared_problems,
)
from lepton_fed.config.schema import (
    ClientConf,
    Policy,
    Privacy,
    ServerConf,
    SimulationConf,
    Source,
)
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem

__all__ = ["LEAVES", "OUTSIDE_EPSILON", "name_problem", "problems_of", "task_problems"]

OUTSIDE_EPSILON = ("evaluation",)
LEAVES = ("evaluation", "epsilon", "rows", "budget")

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_HOURS = re.compile(rf"(?:{_CLOCK})-(?:{_CLOCK}|24:00)")
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})")
_LARGEST_PORT = 65535
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3}(,[0-9]{1,3})*)?")


def problems_of(conf: object) -> list[Problem]:
    """Return the contradictions in a conf, without places.

    Args:
        conf: A conf of any kind, or a :class:`Task` (keys are then relative to it); of anything
            else nothing is said.
    """
    if isinstance(conf, Task):
        return list(task_problems(conf))
    found: list[Problem] = []
    if isinstance(conf, (SimulationConf, ServerConf)):
        found += (replace(p, key=f"task.{p.key}") for p in task_problems(conf.task))
        found += _plan(conf)
        found += record_problems(conf.task, conf.privacy)
        found += correlated_problems(conf.privacy)
        cohort = (
            conf.rounds.cohort_size(conf.sites.count) if isinstance(conf, SimulationConf) else 0
        )
        found += shared_problems(conf.task, conf.privacy, cohort)
        found += client_problems(conf.task, conf.privacy, cohort)
        found += _outside_epsilon(conf.privacy)
        found += _installed("strategies", conf.strategy.name, "strategy.name")
        found += _not_empty(conf.runs, "runs")
    if isinstance(conf, SimulationConf):
        found += _sites(conf)
        found += _secure_aggregation(conf)
        found += _source(conf.sites.source, "sites.source")
        found += _installed("partitioners", conf.sites.partition.name, "sites.partition.name")
        found += _device(conf.device)
    if isinstance(conf, ServerConf):
        found += _server(conf)
    if isinstance(conf, ClientConf):
        found += _client(conf)
    return found


def task_problems(task: Task) -> Iterator[Problem]:
    """Yield the contradictions in a task; keys are relative to it."""
    for rule in _TASK_RULES:
        yield from rule(task)


def _name(task: Task) -> Iterator[Problem]:
    yield from _bad_name(task.name, "name")


def _passes(task: Task) -> Iterator[Problem]:
    training = task.training
    if training.epochs is None and training.steps is None:
        yield Problem(
            "LF1040",
            "neither epochs nor steps says how long a site trains in a round",
            key="training.epochs",
            remedy="set one of training.epochs and training.steps",
        )
    if training.epochs is not None and training.steps is not None:
        yield Problem(
            "LF1040",
            f"epochs ({training.epochs}) and steps ({training.steps}) are both given",
            key="training.steps",
            remedy="set one of them to null",
        )


def _optimiser(task: Task) -> Iterator[Problem]:
    training, schedule = task.training, task.training.schedule
    if training.momentum and training.optimiser != "sgd":
        yield Problem(
            "LF1041",
            f"{training.optimiser} has no momentum setting; it would be ignored",
            key="training.momentum",
            remedy="set it to 0, or optimiser to sgd",
        )
    if schedule.final and schedule.name not in ("linear", "cosine"):
        yield Problem(
            "LF1041",
            f"a {schedule.name} schedule has no final rate; it would be ignored",
            key="training.schedule.final",
            remedy="set it to 0, or schedule.name to linear or cosine",
        )


def _weights(task: Task) -> Iterator[Problem]:
    weight, bound = task.aggregation.weight, task.aggregation.weight_bound
    if weight == "equal" and bound != 1:
        yield Problem(
            "LF1042",
            f"every site has weight 1, but the largest weight admitted is {bound:g}",
            key="aggregation.weight_bound",
            remedy="set it to 1",
        )
    if weight == "rows" and bound <= 1:
        yield Problem(
            "LF1042",
            f"row counts are capped at {bound:g}: all sites would weigh the same",
            key="aggregation.weight_bound",
            remedy="set it to the row count of the largest site, or weight to equal",
        )


def _metrics(task: Task) -> Iterator[Problem]:
    # Imported here: numpy would double the time this module takes to import.
    from lepton_fed.core.metrics import CLASS_METRICS, NUMBER_METRICS

    kind = task.data.target.kind
    fitting: tuple[str, ...] = CLASS_METRICS if kind == "classes" else NUMBER_METRICS
    other: tuple[str, ...] = NUMBER_METRICS if kind == "classes" else CLASS_METRICS
    for index, name in enumerate(task.metrics):
        key = f"metrics[{index}]"
        if name == "loss":
            yield Problem("LF1044", "the loss is always there", key=key, remedy="leave it out")
        elif name in other:
            remedy = f"metrics for {kind}: {', '.join(fitting)}"
            yield Problem("LF1044", f"{name} does not go with {kind}", key=key, remedy=remedy)
        elif name not in fitting:
            remedy = did_you_mean(name, fitting, noun=f"metrics for {kind}")
            yield Problem("LF1043", f"unknown metric {name!r}", key=key, remedy=remedy)
        elif name == "auc" and len(task.data.target.classes) != 2:
            what = f"auc needs two classes; the target has {len(task.data.target.classes)}"
            yield Problem("LF1044", what, key=key, remedy="leave it out")
    yield from distinct(task.metrics, "metrics", "LF1044", "metric")


def _model(task: Task) -> Iterator[Problem]:
    yield from _installed("models", task.model.name, "model.name")


_TASK_RULES: tuple[Callable[[Task], Iterator[Problem]], ...] = (
    _name,
    data_problems,
    _model,
    _passes,
    _optimiser,
    _metrics,
    _weights,
)


def _plan(conf: SimulationConf | ServerConf) -> Iterator[Problem]:
    warmup = conf.task.training.schedule.warmup_rounds
    if warmup > conf.rounds.count:
        yield Problem(
            "LF1045",
            f"{warmup} rounds of warm-up do not fit into {conf.rounds.count} rounds",
            key="task.training.schedule.warmup_rounds",
            remedy=f"at most {conf.rounds.count}",
        )


def _randomness(conf: ServerConf) -> Iterator[Problem]:
    if conf.privacy.record.enabled and conf.privacy.record.randomness != "system":
        yield Problem(
            "LF1069",
            "noise from a seed protects nobody: every site refuses it",
            key="privacy.record.randomness",
            remedy="set it to system; only a simulation may take insecure_seeded",
        )
    if conf.kind == "server" and conf.privacy.record.engine == "ghost":
        yield Problem(
            "LF1046",
            "rounding lets a gradient pass ghost clipping unclipped, if the weights are chosen so",
            key="privacy.record.engine",
            remedy="take bookkeeping, which is as small and faster; ghost is for simulations",
        )


def _outside_epsilon(privacy: Privacy) -> Iterator[Problem]:
    for index, name in enumerate(privacy.outside_epsilon):
        if name not in OUTSIDE_EPSILON:
            remedy = did_you_mean(name, OUTSIDE_EPSILON, noun="known numbers")
            key = f"privacy.outside_epsilon[{index}]"
            what = f"{name!r} is no number that a site could send"
            yield Problem("LF1047", what, key=key, remedy=remedy)
    yield from distinct(privacy.outside_epsilon, "privacy.outside_epsilon", "LF1047", "number")


def _secure_aggregation(conf: SimulationConf) -> Iterator[Problem]:
    secure = conf.privacy.secure_aggregation
    selected, needed = conf.rounds.cohort_size(conf.sites.count), secure.least_sites()
    if secure.enabled and selected < needed:
        name = "groups" if secure.groups > 1 else "min_cohort"
        yield Problem(
            "LF1059",
            f"{selected} sites are selected for a round; {needed} are needed to hide an update",
            key=f"privacy.secure_aggregation.{name}",
            remedy="more sites, fewer groups, or a larger rounds.fraction",
        )


def _sites(conf: SimulationConf) -> Iterator[Problem]:
    sites, rounds = conf.sites, conf.rounds
    if sites.names and len(sites.names) != sites.count:
        yield Problem(
            "LF1048",
            f"{sites.count} sites, but {len(sites.names)} names",
            key="sites.names",
            remedy="leave out sites.count, or give as many names",
        )
    for index, name in enumerate(sites.names):
        yield from _bad_name(name, f"sites.names[{index}]")
    yield from distinct(sites.names, "sites.names", "LF1048", "site")
    selected = rounds.cohort_size(sites.count)
    if rounds.quorum > selected:
        yield Problem(
            "LF1049",
            f"a quorum of {rounds.quorum} is never reached: {selected} of {sites.count} "
            "sites are selected for a round",
            key="rounds.quorum",
            remedy=f"at most {selected}, or select more sites",
        )
    if rounds.evaluate and not sites.held_out:
        yield Problem(
            "LF1050",
            "rounds.evaluate is on, but no rows are kept for it",
            key="sites.held_out",
            remedy="keep some (0.2), or set rounds.evaluate to false",
        )


def _server(conf: ServerConf) -> Iterator[Problem]:
    yield from _randomness(conf)
    yield from _address(conf.listen, "listen")
    yield from _monitor(conf.monitor)
    for key in ("roster", "state", "signing_key"):
        yield from _not_empty(getattr(conf, key), key)
    for key in ("certificate", "key", "ca"):
        yield from _not_empty(getattr(conf.tls, key), f"tls.{key}")


def _client(conf: ClientConf) -> Iterator[Problem]:
    yield from _bad_name(conf.name, "name")
    yield from _address(conf.coordinator, "coordinator")
    yield from _source(conf.source, "source")
    yield from _device(conf.device)
    for key in ("task", "state", "coordinator_key", "ca", "roster", "identity_key", "node_key"):
        yield from _not_empty(getattr(conf, key), key)
    yield from _not_empty(conf.budget.dataset, "budget.dataset")
    yield from _policy(conf.policy)


def _policy(policy: Policy) -> Iterator[Problem]:
    for index, digest in enumerate(policy.tasks):
        if not _DIGEST.fullmatch(digest):
            yield Problem(
                "LF1055",
                f"{digest!r} is no digest of a task",
                key=f"policy.tasks[{index}]",
                remedy="write 12 to 64 hexadecimal digits, as `lepton-fed check` prints them",
            )
    for index, hours in enumerate(policy.hours):
        if not _HOURS.fullmatch(hours):
            yield Problem(
                "LF1056",
                f"{hours!r} is no span of hours",
                key=f"policy.hours[{index}]",
                remedy="write 18:00-06:00, or 00:00-24:00 for always",
            )
    for index, name in enumerate(policy.leaves):
        if name not in LEAVES:
            remedy = did_you_mean(name, LEAVES, noun="known numbers")
            what = f"{name!r} is no number that could leave the site"
            yield Problem("LF1047", what, key=f"policy.leaves[{index}]", remedy=remedy)
    yield from distinct(policy.leaves, "policy.leaves", "LF1047", "number")
    if policy.roster == "follow" and policy.privacy.secure_aggregation.required:
        yield Problem(
            "LF1065",
            "who signs the roster could put sites of its own into every sum, and read the rest",
            key="policy.roster",
            remedy="set it to confirm, or policy.privacy.secure_aggregation.required to false",
        )


def _address(address: str, key: str) -> Iterator[Problem]:
    match = _ADDRESS.fullmatch(address)
    if not match or not 1 <= int(match["port"]) <= _LARGEST_PORT:
        yield Problem(
            "LF1054",
            f"{address!r} is no address and port",
            key=key,
            remedy="write fed.example.org:9092 or 10.0.0.5:9092",
        )


def _monitor(address: str) -> Iterator[Problem]:
    if not address:
        return
    wrong = list(_address(address, "monitor"))
    yield from wrong
    if not wrong and not _is_loopback(address.rpartition(":")[0].strip("[]")):
        yield Problem(
            "LF1057",
            f"{address!r} is no loopback address: the monitor asks nobody who they are",
            key="monitor",
            remedy="write 127.0.0.1:9093, and let a reverse proxy with access control pass it on",
        )


def _is_loopback(host: str) -> bool:
    # By number only: what a name stands for is decided elsewhere, and may change.
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _source(source: Source, key: str) -> Iterator[Problem]:
    yield from _installed("readers", source.reader, f"{key}.reader")


def _device(device: str) -> Iterator[Problem]:
    if not _DEVICE.fullmatch(device):
        remedy = "write cpu, cuda, cuda:1, or several GPUs by index: cuda:0,1"
        yield Problem("LF1052", f"{device!r} is no device", key="device", remedy=remedy)


def name_problem(name: str, key: str) -> Problem | None:
    """Return what is wrong with the name of a site; None when nothing is."""
    return next(_bad_name(name, key), None)


def _bad_name(name: str, key: str) -> Iterator[Problem]:
    if not _NAME.fullmatch(name):
        yield Problem(
            "LF1051",
            f"{name!r} cannot be a name: it becomes part of file names",
            key=key,
            remedy="use a to z, 0 to 9, - and _, at most 63, the first a letter or a digit",
        )


def _not_empty(path: str, key: str) -> Iterator[Problem]:
    if not path.strip():
        yield Problem("LF1053", "the path is empty", key=key, remedy="name a file or folder")


def _installed(group: Group, name: str, key: str) -> Iterator[Problem]:
    problem = plugins.unknown(group, name, key=key)
    if problem is not None:
        yield problem

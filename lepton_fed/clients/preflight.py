"""What `lepton-fed check` looks at for a site, before the first contact."""

from __future__ import annotations

import shutil
from pathlib import Path

from lepton_fed.clients.first_contact import reach
from lepton_fed.clients.own_ledger import open_ledger
from lepton_fed.clients.policy import allows_task
from lepton_fed.config.load import load_task
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.task import Task
from lepton_fed.data.read import read
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.identity.certificates import check_authorities
from lepton_fed.identity.keys import load_private_key, load_public_key
from lepton_fed.identity.node_key import load_node_key, node_public_line
from lepton_fed.identity.pinned import PinnedRoster
from lepton_fed.identity.signature import fingerprint
from lepton_fed.identity.words import key_words
from lepton_fed.runs.checks import Checklist
from lepton_fed.training.device import devices_of

__all__ = ["check_client"]

_ROOM_BYTES = 2**30


def check_client(conf: ClientConf) -> Checklist:
    """Check a site's conf: keys, roster, data, policy, device, disk, ledger, connection and clock.

    Args:
        conf: The conf.
    """
    checks = Checklist()
    task = checks.add(
        "task", lambda: load_task(conf.task), lambda task: f"{task.name}, {task.digest[:12]}"
    )
    if task is not None:
        checks.add(
            "data",
            lambda: read(conf.source, task.data, key="source"),
            lambda rows: f"{len(rows)} rows fit the task's contract",
            "correct the rows, or agree with the coordinator on another contract",
        )
        checks.add("policy", lambda: _check_policy(conf, task), str)
    checks.add(
        "device", lambda: devices_of(conf.device), lambda devices: ", ".join(map(str, devices))
    )
    checks.add("disk", lambda: _check_disk(Path(conf.state)), str)
    checks.add("ledger", lambda: _check_ledger(conf), str)
    checks.add("coordinator key", lambda: load_public_key(Path(conf.coordinator_key)), fingerprint)
    checks.add(
        "identity key",
        lambda: load_private_key(Path(conf.identity_key)),
        lambda key: key_words(key.public_key()),
    )
    checks.add("node key", lambda: load_node_key(Path(conf.node_key)), lambda key: "EC P-384")
    checks.add("roster", lambda: _check_roster(conf), str)
    checks.add("authority", lambda: check_authorities(Path(conf.ca)), str)
    contact = checks.add(
        "connection",
        lambda: reach(conf.coordinator, Path(conf.ca)),
        lambda contact: f"{conf.coordinator} answers, its certificate is good",
    )
    if contact is not None:
        checks.add("clock", contact.check_clock, str)
    return checks


def _check_policy(conf: ClientConf, task: Task) -> str:
    policy = conf.policy
    if not allows_task(policy, task.digest, task.model.name):
        raise Refused(
            Problem("LF4601", f"the policy allows neither task {task.digest[:12]} nor its model",
                    key="policy.tasks",
                    remedy=f"to allow it: policy.tasks: [{task.digest[:12]}]")
        )  # fmt: skip
    hours = ", ".join(policy.hours) or "never"
    leaves = ", ".join(["the update", *policy.leaves])
    return f"allows this task, {policy.rounds} rounds, {hours}; leaves: {leaves}"


def _check_disk(state: Path) -> str:
    there = state.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < _ROOM_BYTES:
        raise RunError(
            Problem("LF5334", f"{free / 2**20:.0f} MiB are free, 1 GiB should be",
                    where=str(state), key="state", remedy="free some, or choose another disk")
        )  # fmt: skip
    return f"{free / 2**30:.0f} GiB free"


def _check_ledger(conf: ClientConf) -> str:
    head = conf.ledger.head
    if head and not Path(head).parent.is_dir():
        raise Refused(
            Problem("LF4211", "the second place has no folder for the file", where=head,
                    key="ledger.head", remedy="mount its disk, or make the folder")
        )  # fmt: skip
    left = open_ledger(conf).left
    return f"{left:.4g} of epsilon {conf.budget.epsilon:g} is left of {conf.budget.dataset}"


def _check_roster(conf: ClientConf) -> str:
    roster = PinnedRoster(
        Path(conf.roster), Path(conf.state), load_public_key(Path(conf.coordinator_key)), False
    ).current
    member = roster.member(conf.name)
    identity = load_private_key(Path(conf.identity_key)).public_key().public_bytes_raw().hex()
    node_key = node_public_line(load_node_key(Path(conf.node_key)))
    if member is None or (member.identity, member.node_key) != (identity, node_key):
        raise Refused(
            Problem("LF4512", f"the roster does not name {conf.name} with this site's keys",
                    where=conf.roster, key="roster",
                    remedy=f"send the coordinator {conf.name}.enrol.json, and fetch roster.json "
                    "when it has enrolled you")
        )  # fmt: skip
    return f"version {roster.version}, {len(roster.sites)} sites"

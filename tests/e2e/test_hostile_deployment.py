"""Strangers, a hostile coordinator, a refusing site and a killed one: who is harmed, and how much.

One deployment for the whole module. First a coordinator that its owner has turned against the
sites holds the address, with a certificate and a node register that they trust: it attacks the
first site, a real ``lepton-fed client`` process. Then the honest coordinator takes the address
over, and that same process has to do its part of a run in which one site refuses, one is killed,
and two kinds of strangers knock.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import pickle
import re
import secrets
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lepton_fed.flower.superlink import APP_ID
from lepton_fed.flower.supernode import REFUSED_SIGNATURE, supernode_command, supernode_environment
from lepton_fed.identity.node_key import generate_node_key
from tests.e2e.federation import SITES, Deployment, free_port, lepton
from tests.e2e.hostile import (
    AUTHORITY,
    MARKER,
    PROTOBUF,
    Poison,
    attacks,
    calls,
    code_as_text,
    hostile_app,
    npy,
)

VICTIM, EAST, KILLED = SITES
REFUSING = "west"
STRANGER = "stranger"
ROUNDS = 4


# --- strangers


def raw_call(port: int, certificate: Path, path: str) -> int:
    """Return the status of a call of a path that goes out as it is written."""
    context = ssl.create_default_context(cafile=str(certificate))
    line = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    try:
        line.request("POST", path, body=b"", headers=PROTOBUF)
        return line.getresponse().status
    finally:
        line.close()


def listening_ports(process: int) -> list[int]:
    """Return the TCP ports that a process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
        if found:
            inodes.add(found[1])
    rows = Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]
    return [
        int(row.split()[1].split(":")[1], 16)
        for row in rows
        if row.split()[3] == "0A" and row.split()[9] in inodes
    ]


def register(root: Path) -> tuple[int, int]:
    """Return how many runs and nodes the honest coordinator's Flower knows."""
    with closing(sqlite3.connect(root / "state" / "coordinator" / "flower.sqlite")) as database:
        ((runs,),) = database.execute("SELECT COUNT(*) FROM run")
        ((nodes,),) = database.execute("SELECT COUNT(*) FROM node")
    return runs, nodes


# --- the deployment


@dataclass
class Attacked:
    """The deployment, and what the hostile coordinator saw of it."""

    deployment: Deployment
    marker: Path
    answers: Mapping[str, str]
    statuses: Mapping[str, Mapping[str, int]]
    alive: bool
    said: str


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A site that has been attacked, and still runs; the hostile coordinator is gone."""
    root = tmp_path_factory.mktemp("hostile")
    deployment = Deployment(root, "privacy.record.enabled=false", f"rounds.count={ROUNDS}")
    add_the_refusing_site(deployment)
    edit(root / "server.yaml", patience=1.0)
    try:
        process = deployment.start(VICTIM)
        saw = subprocess.run(
            [sys.executable, "-m", "tests.e2e.hostile", str(root), str(deployment.port), VICTIM],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert saw.returncode == 0, saw.stderr + deployment.said(VICTIM)
        yield Attacked(
            deployment,
            root / MARKER,
            **json.loads(saw.stdout),
            alive=process.poll() is None,
            said=deployment.said(VICTIM),
        )
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def orphans() -> list[int]:
    """The processes that the killed site had started; known once it was killed."""
    return []


@pytest.fixture(scope="module")
def federation(attacked: Attacked, orphans: list[int]) -> Deployment:
    """The honest coordinator's run, in which one site refuses and another is killed."""
    deployment = attacked.deployment
    deployment.start("coordinator")
    deployment.wait_for("the coordinator", lambda: "listening on" in deployment.said("coordinator"))
    for name in (EAST, KILLED, REFUSING):
        deployment.start(name)
    generate_node_key(deployment.root / "keys" / f"{STRANGER}.node")
    start_a_supernode(deployment, STRANGER, f"keys/{STRANGER}.node")
    deployment.wait_for_event("reply.accepted", site=KILLED, round=1)
    orphans += children(deployment.processes[KILLED].pid)
    deployment.processes[KILLED].kill()
    deployment.wait_for_event("run.finished")
    return deployment


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def add_the_refusing_site(deployment: Deployment) -> None:
    root = deployment.root
    lepton("keys", "site", REFUSING, cwd=root)
    lepton("keys", "enrol", f"keys/{REFUSING}.enrol.json", cwd=root)
    conf = yaml.safe_load((root / f"{EAST}.yaml").read_text())
    conf |= {
        "name": REFUSING,
        "identity_key": f"keys/{REFUSING}.pem",
        "node_key": f"keys/{REFUSING}.node",
        "state": f"state/{REFUSING}",
    }
    conf["policy"]["rounds"] = 1
    (root / f"{REFUSING}.yaml").write_text(yaml.safe_dump(conf))


def start_a_supernode(deployment: Deployment, who: str, node_key: str) -> None:
    """Start a SuperNode with some key, and everything else right."""
    root = deployment.root
    state = root / "state" / who
    state.mkdir(parents=True)
    secret = state / "secret"
    secret.write_bytes(secrets.token_bytes(32))
    secret.chmod(0o600)
    command = supernode_command(
        coordinator=f"127.0.0.1:{deployment.port}",
        ca=root / AUTHORITY,
        node_key=root / node_key,
        secret=secret,
        port=free_port(),
    )
    with (root / f"{who}.log").open("a") as log:
        deployment.processes[who] = subprocess.Popen(
            command, env=supernode_environment(state), stdout=log, stderr=log, text=True
        )


# --- a hostile coordinator


ATTACKS = (
    "code in the app, no seal",
    "a seal by another key",
    "a seal for another site",
    "a seal for another purpose",
    "code in the message's settings",
    "code for a digest",
    "a pickle for a vector",
    "an unknown question",
    "code for an offer",
    "code for a model",
    "a push out of its folder",
    "a push that nobody signed",
    "a foreign app",
    "an agent of our name",
    "an agent of others",
)


def test_flower_itself_would_run_the_code_of_the_hostile_app(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    fab = hostile_app(APP_ID, marker)
    (tmp_path / "app.fab").write_bytes(fab)
    code = (
        "import hashlib, pathlib, sys\n"
        "from flwr.cli.install import install_from_fab\n"
        "from flwr.clientapp.utils import get_load_client_app_fn\n"
        "fab = pathlib.Path('app.fab').read_bytes()\n"
        "install_from_fab(fab, None, skip_prompt=True)\n"
        "load = get_load_client_app_fn('', None, multi_app=True)\n"
        f"load({APP_ID!r}, '1.0.0', hashlib.sha256(fab).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists()


def test_the_strings_and_the_pickle_would_do_harm_to_who_evaluates_them(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    eval(code_as_text(marker)["expression"])  # noqa: S307 - this is the control
    assert marker.exists()
    np.load(io.BytesIO(npy(pickle.dumps(Poison(tmp_path / "poison")))), allow_pickle=True)
    assert (tmp_path / "poison").exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_coordinator_gets_a_code_and_nothing_else(attacked: Attacked, name: str) -> None:
    tried = attacks(attacked.deployment.root, VICTIM)
    assert set(tried) == set(ATTACKS)
    said = attacked.answers.get(name, "no answer")
    assert re.search(tried[name].says, said), said
    for leak in (str(attacked.deployment.root), "Traceback", ".py", "Error(", "site-packages"):
        assert leak not in said
    assert len(said) < 250, said


def test_nothing_that_a_hostile_coordinator_sent_ran_or_was_kept(attacked: Attacked) -> None:
    assert len(attacked.answers) == len(ATTACKS)
    assert not list(attacked.deployment.root.rglob(attacked.marker.name))
    state = attacked.deployment.root / "state" / VICTIM
    kept = [path for path in state.rglob("*") if path.is_file()]
    assert kept
    assert [path for path in kept if path.suffix in {".py", ".fab", ".zip", ".whl"}] == []
    assert [path for path in kept if b"payload" in path.read_bytes()] == []


def test_the_site_lives_on_under_attack(attacked: Attacked) -> None:
    assert attacked.alive
    assert "worker.refused" in attacked.said
    assert "worker.message_lost" not in attacked.said
    assert "connection.ended" not in attacked.said


def test_the_attacked_site_then_does_its_part_for_the_honest_coordinator(
    attacked: Attacked, federation: Deployment
) -> None:
    rounds = accepted(federation, VICTIM)
    assert rounds == list(range(1, ROUNDS + 1))
    assert federation.processes[VICTIM].poll() is None
    assert not attacked.marker.exists()


# --- strangers


def test_a_supernode_with_an_unknown_key_is_refused(federation: Deployment) -> None:
    stranger = federation.processes[STRANGER]
    federation.wait_for("refusal of the stranger", lambda: stranger.poll() is not None, 60)
    assert REFUSED_SIGNATURE in federation.said(STRANGER)
    assert "SuperNode ID" not in federation.said(STRANGER)
    assert STRANGER not in json.dumps(federation.events())
    assert register(federation.root)[1] == len(SITES) + 1


def test_the_same_supernode_with_a_key_of_the_roster_is_let_in(federation: Deployment) -> None:
    start_a_supernode(federation, "heir", f"keys/{KILLED}.node")
    federation.wait_for("the heir's connection", lambda: "SuperNode ID" in federation.said("heir"))


def test_a_site_that_waits_for_the_coordinator_is_not_turned_away(federation: Deployment) -> None:
    # Not even the stranger got as far as Flower.
    assert "/v1/fleet/activate-node" not in federation.said("coordinator")
    for name in (EAST, KILLED, REFUSING):
        assert "connection.refused" not in federation.said(name)
    # The victim was let in by the hostile coordinator, of which this one knows nothing.
    assert federation.said(VICTIM).count("connection.refused") <= 1


def test_a_stranger_finds_nothing_at_either_listener(
    attacked: Attacked, federation: Deployment
) -> None:
    authority = federation.root / AUTHORITY
    before = register(federation.root)
    ports = listening_ports(federation.processes["coordinator"].pid)
    assert federation.port in ports
    private = [port for port in ports if port != federation.port]
    assert private
    found = [calls(f"https://127.0.0.1:{federation.port}", authority)]
    found += [calls(f"http://127.0.0.1:{port}") for port in private]
    found += [
        calls(f"http://127.0.0.1:{port}", headers={"x-lepton-secret": "0" * 64}) for port in private
    ]
    assert [set(statuses.values()) for statuses in found] == [{404}] * len(found)
    assert register(federation.root) == before == (1, len(SITES) + 1)
    # The same calls are answered to who knows the secret; a task takes another one still.
    assert set(attacked.statuses["public"].values()) == {404}
    assert set(attacked.statuses["private"].values()) == {404}
    assert attacked.statuses["private with the secret"] == {
        **dict.fromkeys(attacked.statuses["private"], 200),
        "runtime/acquire-task": 401,
    }


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/%2e%2e%2fcontrol%2flist-nodes",
        "//v1/control/list-nodes",
        "/V1/CONTROL/list-nodes",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_no_spelling_of_a_path_leads_past_the_public_listener(
    federation: Deployment, path: str
) -> None:
    assert raw_call(federation.port, federation.root / AUTHORITY, path) in (
        401,
        404,
    )


def test_a_stranger_on_the_sites_machine_takes_no_task(federation: Deployment) -> None:
    (supernode,) = children(federation.processes[VICTIM].pid, "lepton_fed.flower.supernode")
    (port,) = listening_ports(supernode)
    assert calls(f"http://127.0.0.1:{port}")["runtime/acquire-task"] in (401, 403)


# --- sites that refuse or die


def test_the_reason_of_a_site_that_refuses_by_policy_is_known_at_both_ends(
    federation: Deployment,
) -> None:
    refusals = [e for e in federation.events() if e["event"] == "site.refused"]
    assert [(e["site"], e["code"]) for e in refusals] == [(REFUSING, "LF4603")]
    assert f"rounds: {ROUNDS}" in refusals[0]["why"]
    own = [line for line in federation.said(REFUSING).splitlines() if "LF4603" in line]
    assert own
    assert f"rounds: {ROUNDS}" in own[0]
    assert accepted(federation, REFUSING) == []
    assert federation.processes[REFUSING].poll() is None


def test_a_killed_site_costs_its_own_contribution_only(federation: Deployment) -> None:
    assert federation.processes[KILLED].poll() == -9
    before = accepted(federation, KILLED)
    assert before == list(range(1, len(before) + 1))
    assert 1 <= len(before) < ROUNDS
    for name in (VICTIM, EAST):
        assert accepted(federation, name) == list(range(1, ROUNDS + 1))


def test_the_processes_of_a_killed_site_end_with_it(
    federation: Deployment, orphans: list[int]
) -> None:
    assert len(orphans) >= 2  # its connection and what trains
    federation.wait_for("end of them", lambda: not any(map(running, orphans)), 30)


def accepted(federation: Deployment, site: str) -> list[int]:
    """Return the rounds to which a site contributed."""
    return [
        event["round"]
        for event in federation.events()
        if event["event"] == "reply.accepted" and event["site"] == site
    ]


def children(process: int, word: str = "") -> list[int]:
    """Return the children of a process that have a word on their command line."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    found = {int(child) for task in tasks for child in task.read_text().split()}
    return sorted(c for c in found if word in Path(f"/proc/{c}/cmdline").read_text())


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and nobody has asked for its exit code

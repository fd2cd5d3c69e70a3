"""A site as it stands on its owner's machine: keys, roster, rows, conf, and plug-ins installed."""

from __future__ import annotations

import os
import shutil
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    AggregationFloor,
    Budget,
    ClientConf,
    Policy,
    Privacy,
    PrivacyFloor,
    Source,
    StrategyConf,
)
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.roster import Member, Roster, enrol, roster_file, write_roster
from lepton_fed.training.kit import build_kit

PLUGINS = """
    import os, signal, subprocess, sys, time
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np

    from lepton_fed.data.array_files import npz_file
    from lepton_fed.strategies.base import PlainSite, Strategy
    from lepton_fed.strategies.fedavg import fedavg


    def noisy(contract, path: str, with_target: bool):
        '''Read an NPZ file, count it, and talk all the while.'''
        print("reading", path)
        os.write(1, b"\\x00garbage\\n" * 1000)
        with open(path + ".reads", "a") as file:
            file.write("read\\n")
        return npz_file(contract=contract, path=path, with_target=with_target)


    @dataclass(frozen=True)
    class Unruly(PlainSite):
        '''Does what a file says, once.'''

        def update(self, memory, delta, steps, learning_rate):
            order = Path(os.environ["UNRULY"])
            if order.exists():
                word = order.read_text()
                order.unlink()
                if word == "hang":
                    child = subprocess.Popen(["sleep", "600"])
                    order.with_suffix(".pids").write_text(f"{os.getpid()} {child.pid}")
                    time.sleep(600)
                if word == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if word == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if word == "read":
                    input()
                if word == "print":
                    os.write(1, b"garbage" * 100)
                    print("more of it", flush=True)
            return super().update(memory, delta, steps, learning_rate)


    def unruly() -> Strategy:
        '''Federated averaging by sites that misbehave.'''
        return Strategy("unruly", Unruly(), fedavg().server)
"""

TASK = Task(
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
    training=TrainingSpec(batch_size=8, learning_rate=0.2),
    metrics=["accuracy"],
)
ALLOWED = Policy(
    models=["linear"],
    strategies=["fedavg", "unruly"],
    rounds=10,
    epochs=5,
    batch_size=64,
    seconds_per_round=300.0,
    hours=["00:00-24:00"],
    privacy=PrivacyFloor(False, 3.0, secure_aggregation=AggregationFloor(required=False)),
    leaves=["evaluation", "epsilon"],
)


def agreement_for(run="run-1", task=TASK, strategy="fedavg", privacy=None, seed=5, rounds=3):
    """Return what a coordinator offers."""
    return Agreement(run, task, StrategyConf(strategy), rounds, seed, privacy or Privacy())


def ask_for(agreement, round_number=1, train=True, evaluate=False, **changes):
    """Return an ask with the model of the first round."""
    kit = build_kit(agreement.task, agreement.seed)
    asked = Ask(
        agreement.digest,
        kit.layout.digest,
        round_number,
        train,
        evaluate,
        {MODEL: kit.initial.copy()},
    )
    return replace(asked, **changes)


@pytest.fixture
def plugins_installed(tmp_path, monkeypatch):
    """Install the plug-ins above for the processes that a test starts."""
    folder = tmp_path / "plugins"
    about = folder / "unruly-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "unruly_plugins.py").write_text(textwrap.dedent(PLUGINS))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[lepton_fed.strategies]\nunruly = unruly_plugins:unruly\n"
        "[lepton_fed.readers]\nnoisy = unruly_plugins:noisy\n"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )
    order = tmp_path / "order"
    monkeypatch.setenv("UNRULY", str(order))
    return order


@pytest.fixture
def conf(tmp_path):
    """Return the conf of a site whose rows and folders are there."""
    draws = np.random.Generator(np.random.PCG64(0))
    inputs = draws.normal(size=(50, 2)).astype(np.float32)
    labels = (inputs @ np.array([1.0, -2.0]) > 0).astype(np.int64)
    np.savez(tmp_path / "rows.npz", inputs=inputs, label=labels)
    return ClientConf(
        name="north",
        coordinator_key=str(tmp_path / "coordinator.pub"),
        roster=str(tmp_path / "roster.json"),
        identity_key=str(tmp_path / "north.pem"),
        node_key=str(tmp_path / "north.node"),
        ca=str(tmp_path / "ca.crt"),
        source=Source("npz", str(tmp_path / "rows.npz")),
        policy=ALLOWED,
        budget=Budget(epsilon=3.0),
        state=str(tmp_path / "state"),
    )


class Parties:
    """The coordinator's and the site's keys, and the roster.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder):
        self.folder = folder
        for name in ("coordinator", "north"):
            generate_key(folder / f"{name}.pem")
        make_certificates(folder / "tls", [])
        shutil.copy(folder / "tls" / "ca.crt", folder)
        self.coordinator = load_private_key(folder / "coordinator.pem")
        self.key = load_private_key(folder / "north.pem")
        self.identity = self.key.public_key()
        self.node_key = generate_node_key(folder / "north.node")
        self.roster = enrol(Roster(1, _hex(self.coordinator.public_key()), [], ""), self.member())
        write_roster(folder / "roster.json", self.roster, self.coordinator)

    def member(self, **changes):
        return replace(Member("north", _hex(self.identity), self.node_key), **changes)

    def another(self, name):
        """Return a site of another name, with keys of its own."""
        identity = generate_key(self.folder / f"{name}.pem")
        return Member(name, _hex(identity), generate_node_key(self.folder / f"{name}.node"))

    def signed(self, roster=None):
        return roster_file(roster or self.roster, self.coordinator)


def _hex(key):
    return key.public_bytes_raw().hex()


@pytest.fixture
def parties(tmp_path):
    """Return keys and roster of a coordinator and the site north."""
    return Parties(tmp_path)

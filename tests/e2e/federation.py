"""A coordinator and sites as separate processes on 127.0.0.1, as their owners would start them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.simulations.population import populate

SITES = ("north", "east", "south")
PATIENCE_S = 240.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def lepton(*words: str, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "lepton_fed", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert code is None or done.returncode == code, (
        f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


class Deployment:
    """The folders of a coordinator and its sites: confs, keys, data; and their processes.

    Args:
        root: Where everything goes.
        task: Overrides of the shipped task, rounds and privacy, as ``key=value``.
        secure: Whether sites' updates are masked. Most tests look at what one site sends.
        sites: Names of the sites.
    """

    def __init__(
        self, root: Path, *task: str, secure: bool = False, sites: Sequence[str] = SITES
    ) -> None:
        self.root = root
        self.sites = tuple(sites)
        self.port = free_port()
        self.task = task
        self.secure = secure
        self.processes: dict[str, subprocess.Popen[str]] = {}
        simulation = load_values(SimulationConf, self._shipped("simulation"), list(task))
        self.simulation = simulation
        self.population = {site.name: site for site in populate(simulation.conf)}
        lepton("keys", "coordinator", cwd=root)
        for name in self.sites:
            lepton("keys", "site", name, cwd=root)
        lepton("keys", "enrol", *(f"keys/{name}.enrol.json" for name in self.sites), cwd=root)
        self._write_confs()

    def _shipped(self, kind: str) -> dict[str, Any]:
        values = template(kind)
        values["privacy"]["secure_aggregation"]["enabled"] = self.secure
        values["rounds"]["quorum"] = 3 if self.secure else 2
        return values

    def _write_confs(self) -> None:
        server = self._shipped("server")
        server |= {"listen": f"127.0.0.1:{self.port}", "gather_s": PATIENCE_S, "monitor": ""}
        (self.root / "server.yaml").write_text(yaml.safe_dump(server))
        for name in self.sites:
            self.write_rows(name)
            client = template("client")
            client |= {
                "name": name,
                "coordinator": f"127.0.0.1:{self.port}",
                "identity_key": f"keys/{name}.pem",
                "node_key": f"keys/{name}.node",
                "task": "server.yaml",
                "source": {"reader": "npz", "path": f"{name}.npz"},
                "state": f"state/{name}",
            }
            client["policy"]["privacy"]["record"] = False
            client["policy"]["privacy"]["secure_aggregation"]["required"] = self.secure
            client["policy"]["leaves"] = ["evaluation", "epsilon"]
            (self.root / f"{name}.yaml").write_text(yaml.safe_dump(client))

    def write_rows(self, name: str) -> None:
        """Write a site's rows in the order in which the simulation's partition has them."""
        from lepton_fed.core.seeds import generator
        from lepton_fed.data.partitioners import partition
        from lepton_fed.data.read import read

        conf = self.simulation.conf
        rows = read(conf.sites.source, conf.task.data)
        parts = partition(
            rows,
            conf.task.data,
            conf.sites.partition,
            len(self.sites),
            generator(conf.seed, "partition"),
        )
        mine = rows.take(parts[self.sites.index(name)])
        np.savez(self.root / f"{name}.npz", inputs=mine.inputs, label=mine.targets)

    def start(self, who: str, *words: str) -> subprocess.Popen[str]:
        """Start the coordinator or a site; what it says goes to a file of its name."""
        command = (
            ["server", "--conf", "server.yaml", *self.task]
            if who == "coordinator"
            else ["client", "--conf", f"{who}.yaml"]
        )
        with (self.root / f"{who}.log").open("a") as log:
            self.processes[who] = subprocess.Popen(
                [sys.executable, "-m", "lepton_fed", *command, *words],
                cwd=self.root,
                stdout=log,
                stderr=log,
                text=True,
            )
        return self.processes[who]

    def said(self, who: str) -> str:
        return (self.root / f"{who}.log").read_text()

    def events(self) -> list[dict[str, Any]]:
        """Return the events of all runs so far."""
        lines = [
            line
            for path in sorted((self.root / "runs").glob("*/events.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines]

    def wait_for(self, what: str, found: Any, seconds: float = PATIENCE_S) -> Any:
        """Wait until ``found()`` is something, or tell what everybody said."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            result = found()
            if result:
                return result
            coordinator = self.processes.get("coordinator")
            if coordinator and coordinator.poll() not in (None, 0):
                break
            time.sleep(0.2)
        told = "\n".join(f"--- {who}\n{self.said(who)}" for who in self.processes)
        raise AssertionError(f"{what} did not happen\n{told}")

    def wait_for_event(self, name: str, **fields: Any) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            for event in self.events():
                if event["event"] == name and all(event.get(k) == v for k, v in fields.items()):
                    return event
            return None

        return self.wait_for(f"{name} {fields}", found)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for who, process in self.processes.items():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{who} did not stop:\n{self.said(who)}") from None


@contextmanager
def deployed(
    root: Path, *task: str, start: Sequence[str] = SITES, secure: bool = False
) -> Iterator[Deployment]:
    """Start a coordinator and sites, and stop them in the end."""
    found = Deployment(root, *task, secure=secure)
    try:
        found.start("coordinator")
        for name in start:
            found.start(name)
        yield found
    finally:
        found.stop()

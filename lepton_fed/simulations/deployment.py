"""A whole federation on one machine: keys, confs, rows, and each party as a process of its own.

It is what an owner would do by hand on several machines, `docs/tutorials/three-machines.md`, with
nothing left out: TLS, node authentication, a signed roster, a policy at every site.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lepton_fed.config.render import render
from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.digests import plain
from lepton_fed.core.seeds import generator
from lepton_fed.data.partitioners import partition
from lepton_fed.data.read import read
from lepton_fed.errors import Problem, RunError
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.roster import Member, Roster, enrol, write_roster
from lepton_fed.runs.events import Event
from lepton_fed.simulations.population import site_names

__all__ = ["COORDINATOR", "LocalDeployment"]

COORDINATOR = "coordinator"
"""Name of the coordinator's log and process."""

_LOOK_S = 0.1
_STOP_S = 15.0
_RUN_S = 1800.0


class LocalDeployment:
    """A coordinator and sites on this machine, as processes.

    Args:
        conf: Task, rounds, privacy and seed of the run; its sites' rows are split as a simulation
            splits them.
        folder: Receives keys, confs, rows, state and logs.
        listeners: Called with each event of the coordinator's run.
    """

    def __init__(
        self,
        conf: SimulationConf,
        folder: Path,
        listeners: tuple[Callable[[Event], None], ...] = (),
    ) -> None:
        self._conf = conf
        self._folder = folder.absolute()
        self._listeners = listeners
        self._port = _free_port()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._reader: threading.Thread | None = None
        self.names = site_names(conf)

    def prepare(self) -> None:
        """Make keys, certificates and roster, and write every party's conf and rows.

        Raises:
            LeptonError: Something cannot be made or read.
        """
        keys = self._folder / "keys"
        signing = keys / "coordinator.pem"
        if not signing.exists():
            generate_key(signing)
        private = load_private_key(signing)
        if not (keys / "tls").exists():
            make_certificates(keys / "tls", [])
        roster = Roster(1, private.public_key().public_bytes_raw().hex(), [], "")
        for name in self.names:
            roster = enrol(roster, self._site_keys(keys, name))
        write_roster(keys / "roster.json", roster, private)
        self._write_confs(keys)
        self._write_rows()

    def __enter__(self) -> LocalDeployment:
        """Start everybody."""
        try:
            server = self._start(COORDINATOR, "server", "--conf", str(self.conf_of(COORDINATOR)))
            self._reader = threading.Thread(target=self._listen, args=(server,), daemon=True)
            self._reader.start()
            for name in self.names:
                self._start(name, "client", "--conf", str(self.conf_of(name)))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everybody."""
        self._stop()

    def conf_of(self, who: str) -> Path:
        """Return the conf of the coordinator or a site."""
        return self._folder / "conf" / f"{'server' if who == COORDINATOR else who}.yaml"

    def state_of(self, who: str) -> Path:
        """Return the state folder of the coordinator or a site."""
        return self._folder / "state" / who

    def wait_for_run(self) -> Path:
        """Wait until the run is finished, and return its folder.

        Raises:
            RunError: LF5213, it did not finish.
        """
        until = time.monotonic() + _RUN_S
        while time.monotonic() < until:
            for summary in (self._folder / "runs").glob("*/summary.json"):
                return summary.parent
            ended = [who for who, process in self._processes.items() if process.poll() is not None]
            if ended or self._failed:
                break
            time.sleep(_LOOK_S)
        logs = self._folder / "logs"
        raise RunError(
            Problem("LF5213", "the deployment did not finish its run", where=str(logs),
                    remedy="the logs of coordinator and sites say why")
        )  # fmt: skip

    _failed = False

    def _site_keys(self, keys: Path, name: str) -> Member:
        identity, node = keys / f"{name}.pem", keys / f"{name}.node"
        if not identity.exists():
            generate_key(identity)
            generate_node_key(node)
        line = Path(f"{node}.pub").read_text().strip()
        public = load_private_key(identity).public_key()
        return Member(name, public.public_bytes_raw().hex(), line)

    def _write_confs(self, keys: Path) -> None:
        conf = self._conf
        shared = {
            key: plain(getattr(conf, key)) for key in ("task", "strategy", "rounds", "privacy")
        }
        server = {
            "kind": "server",
            **shared,
            "seed": conf.seed,
            "listen": f"127.0.0.1:{self._port}",
            "monitor": "",  # the coordinator of this machine may have that port
            "tls": {
                "certificate": str(keys / "tls" / "server.crt"),
                "key": str(keys / "tls" / "server.key"),
                "ca": str(keys / "tls" / "ca.crt"),
            },
            "roster": str(keys / "roster.json"),
            "runs": str(self._folder / "runs"),
            "state": str(self.state_of(COORDINATOR)),
            "signing_key": str(keys / "coordinator.pem"),
        }
        self._write(COORDINATOR, render(server, "server"))
        for name in self.names:
            self._write(name, render(self._client(name, keys), "client"))

    def _write(self, who: str, text: str) -> None:
        path = self.conf_of(who)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _client(self, name: str, keys: Path) -> Mapping[str, Any]:
        conf, record, training = self._conf, self._conf.privacy.record, self._conf.task.training
        secure, client = conf.privacy.secure_aggregation, conf.privacy.client
        rows = ["rows"] if conf.task.aggregation.weight == "rows" else []
        return {
            "kind": "client",
            "name": name,
            "coordinator": f"127.0.0.1:{self._port}",
            "ca": str(keys / "tls" / "ca.crt"),
            "coordinator_key": str(keys / "coordinator.pub"),
            "roster": str(keys / "roster.json"),
            "identity_key": str(keys / f"{name}.pem"),
            "node_key": str(keys / f"{name}.node"),
            "task": str(self.conf_of(COORDINATOR)),
            "source": {"reader": "npz", "path": str(self._folder / "rows" / f"{name}.npz")},
            "held_out": conf.sites.held_out,
            "device": conf.device,
            "policy": {
                "models": [conf.task.model.name],
                "strategies": [conf.strategy.name],
                "rounds": conf.rounds.count,
                "epochs": training.epochs or 0,
                "steps": training.steps or 0,
                "batch_size": training.batch_size,
                "seconds_per_round": 600.0,
                "hours": ["00:00-24:00"],
                "privacy": {
                    "record": record.enabled,
                    "epsilon": record.epsilon,
                    "delta": record.delta,
                    "honest": 1.0 if record.is_shared or client.is_shared else 0.0,
                    "client": {
                        "epsilon": client.epsilon if client.enabled else 0.0,
                        "delta": client.delta,
                        "trust_coordinator": client.noise == "coordinator",
                    },
                    "secure_aggregation": {
                        "required": secure.enabled,
                        "min_cohort": secure.min_cohort,
                        "threshold": secure.threshold,
                        "post_quantum": secure.post_quantum,
                        "rounds_per_hour": 2 * (conf.rounds.count + 1),
                    },
                },
                "leaves": ["evaluation", "epsilon", *rows],
            },
            "budget": {"epsilon": record.epsilon, "delta": record.delta},
            "state": str(self.state_of(name)),
        }  # fmt: skip

    def _write_rows(self) -> None:
        """Give each site a file with its rows, in the order in which a simulation has them."""
        conf = self._conf
        data = read(conf.sites.source, conf.task.data)
        parts = partition(
            data,
            conf.task.data,
            conf.sites.partition,
            len(self.names),
            generator(conf.seed, "partition"),
        )
        folder = self._folder / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(self.names, parts, strict=True):
            mine = data.take(part)
            arrays = {"inputs": mine.inputs, conf.task.data.target.name: mine.targets}
            np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]

    def _start(self, who: str, *words: str) -> subprocess.Popen[str]:
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        out = subprocess.PIPE if who == COORDINATOR else None
        with (logs / f"{who}.log").open("w") as log:
            self._processes[who] = subprocess.Popen(  # noqa: S603 - this program
                [sys.executable, "-m", "lepton_fed", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=out or log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us, and we stop them in order
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        return self._processes[who]

    def _listen(self, server: subprocess.Popen[str]) -> None:
        """Hand the coordinator's events on; keep everything it says."""
        assert server.stderr is not None  # noqa: S101 - it was started with a pipe
        with (self._folder / "logs" / f"{COORDINATOR}.log").open("a") as log:
            for line in server.stderr:
                log.write(line)
                log.flush()
                with suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and "time" in event and event["event"] != "log":
                        self._failed = self._failed or event["event"] == "run.failed"
                        for listener in self._listeners:
                            listener(event)

    def _stop(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._reader is not None:
            self._reader.join(_STOP_S)
        stderr = self._processes[COORDINATOR].stderr if COORDINATOR in self._processes else None
        if stderr is not None:
            stderr.close()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])

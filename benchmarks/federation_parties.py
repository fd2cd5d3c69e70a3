"""The processes of `benchmarks.federation`: a coordinator, a site, and stand-ins for many sites.

Each is a process of its own, so that its memory and its processor time are its own. The coordinator
is the real SuperLink, transport and round loop. A site is the real SuperNode and the real worker
with an agent that trains nothing: its update differs by site and round, since equal bytes would
not be sent again. Stand-ins speak the Fleet API themselves, as a SuperNode does, for many nodes
with a key each, a few at a time: thirty SuperNodes that hold 100 MB each, several times over, do
not fit into a small machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.idle import Idle
from benchmarks.setting import Measured, Setting
from benchmarks.turns import Waiting
from lepton_fed.config.schema import Rounds
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.pace import Pace
from lepton_fed.flower.superlink import SuperLink
from lepton_fed.flower.supernode import supernode_command, supernode_environment
from lepton_fed.flower.transport import GridTransport, Seals
from lepton_fed.flower.worker import serve
from lepton_fed.identity.keys import load_private_key, load_public_key
from lepton_fed.identity.node_key import node_public_pem
from lepton_fed.runs.events import Event, EventLog
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.intake import shape_of
from lepton_fed.server.masked import MaskedRounds
from lepton_fed.server.rounds import Coordinator
from lepton_fed.strategies.fedavg import fedavg

_IDLE_S = 10.0
_START_S = 300.0


def coordinate(setting: Setting) -> Measured:
    """Be the coordinator of a run and measure it."""
    state = Path(setting.folder) / "coordinator"
    state.mkdir()
    database = state / "flower.sqlite" if setting.database else Path(":flwr-in-memory:")
    link = SuperLink(
        ("127.0.0.1", setting.port),
        setting.key("tls/server.crt"),
        setting.key("tls/server.key"),
        database,
    )
    pems = {n: node_public_pem(setting.key(f"{n}.node.pub").read_text()) for n in setting.names}
    identities = {n: load_public_key(setting.key(f"{n}.pub")) for n in setting.names}
    seals = Seals(load_private_key(setting.key("coordinator.pem")), identities)
    found = Measured()
    link.start(pems)
    try:
        with link.grid() as grid:
            transport = GridTransport(grid, link.nodes(pems), seals=seals)
            until = time.monotonic() + _START_S
            while len(transport.sites()) < setting.sites:
                if time.monotonic() > until:
                    raise TimeoutError("not all sites came")
                time.sleep(0.2)
            _run(setting, transport, state, found)
            if setting.turns:
                found.idle = _idle()
    finally:
        link.stop()
    found.peak_kib = _status("VmHWM")
    return found


def _run(setting: Setting, transport: GridTransport, state: Path, found: Measured) -> None:
    agreement, layout = setting.agreement, setting.layout
    folder = RunFolder.create(state / "runs", "benchmark", "")
    turns = Waiting(Path(setting.turns)) if setting.turns else None
    begun = time.monotonic()

    def heard(event: Event) -> None:
        nonlocal begun
        if event["event"] == "reply.refused":
            found.refused.append(f"{event['site']}: {event['code']} {event['why']}")
        if event["event"] == "round.closed":
            found.rounds_s.append(time.monotonic() - begun)
            found.resident_kib.append(_status("VmRSS"))
            found.files.append(len(list(Path("/proc/self/fd").iterdir())))
            found.database_bytes.append(sum(p.stat().st_size for p in state.glob("flower.sqlite*")))
            if turns is not None:
                turns.done(found.rounds_s[-1])
                if event["round"] < setting.rounds:
                    turns.wait()
            begun = time.monotonic()

    log = EventLog(folder.events, (heard,))
    plan, pace = MetricsPlan.of(agreement.task), Pace(10.0)
    masked = None
    if setting.masked:
        keys = {name: load_public_key(setting.key(f"{name}.pub")) for name in setting.names}
        shape = shape_of(fedavg(), layout, plan)
        masked = MaskedRounds(
            agreement, shape, folder, log, lambda: keys, quorum=setting.sites, patience=10.0
        )
    coordinator = Coordinator(
        agreement, Rounds(setting.rounds, 1.0, setting.sites, evaluate=False), layout,
        plan, fedavg(), folder=folder, log=log, pace=pace, masked=masked,
    )  # fmt: skip
    if turns is not None:
        turns.wait()
    begun = time.monotonic()
    coordinator.run(transport, coordinator.start(np.zeros(setting.floats, np.float32)))
    log.close()
    if turns is not None:
        turns.close()


def _idle() -> float:
    """Return the share of a core that this process uses for a while."""
    used, before = time.process_time(), time.monotonic()
    time.sleep(_IDLE_S)
    return (time.process_time() - used) / (time.monotonic() - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def take_part(setting: Setting, name: str) -> None:
    """Be one site, until the SuperNode ends or this process is told to."""
    state = Path(setting.folder) / name
    state.mkdir()
    secret = state / "secret"
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    port = setting.port + 1 + setting.names.index(name)
    command = supernode_command(
        coordinator=f"127.0.0.1:{setting.port}",
        ca=setting.key("tls/ca.crt"),
        node_key=setting.key(f"{name}.node"),
        secret=secret,
        port=port,
    )
    node = subprocess.Popen(command, env=supernode_environment(state))  # noqa: S603
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        serve(
            Idle(setting, name),
            name=name,
            identity=load_private_key(setting.key(f"{name}.pem")),
            coordinator=load_public_key(setting.key("coordinator.pub")),
            port=port,
            secret=secret.read_bytes(),
            stop=stop,
        )
    finally:
        node.terminate()
        node.wait()


def main() -> None:
    """Be the process that the arguments name, and print what was measured."""
    role, written, *names = sys.argv[1:]
    setting = Setting(**json.loads(written))
    if role == "coordinator":
        found = coordinate(setting)
        (Path(setting.folder) / "measured.json").write_text(json.dumps(asdict(found)))
    elif role == "site":
        take_part(setting, names[0])
    elif role == "stand-ins":
        from benchmarks.stand_ins import stand_in

        stand_in(setting)


if __name__ == "__main__":
    main()

"""What a round costs beyond training, and how much memory the coordinator takes.

Run it as `python -m benchmarks.federation`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.federation_parties import Measured, Setting
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key
from lepton_fed.identity.node_key import generate_node_key

FLOATS_OF_A_MB = 250_000
_STOP_S = 20.0


def make_keys(setting: Setting) -> None:
    """Make everybody's keys and certificates."""
    setting.key("").mkdir(parents=True)
    make_certificates(setting.key("tls"), [])
    generate_key(setting.key("coordinator.pem"))
    for name in setting.names:
        generate_key(setting.key(f"{name}.pem"))
        generate_node_key(setting.key(f"{name}.node"))


@contextlib.contextmanager
def party(setting: Setting, role: str, *names: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of the benchmark."""
    command = [sys.executable, "-m", "benchmarks.federation_parties", role,
               json.dumps(asdict(setting)), *names]  # fmt: skip
    log = Path(setting.folder) / f"{'-'.join((role, *names))}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: S603
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(
    sites: int, floats: int, rounds: int, *, database: bool = True, stand_ins: bool = False
) -> Measured:
    """Run a federation and return what the coordinator measured."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as parties:
        setting = Setting(folder, _free_ports(sites + 1), sites, floats, rounds, database)
        make_keys(setting)
        coordinator = parties.enter_context(party(setting, "coordinator"))
        if stand_ins:
            parties.enter_context(party(setting, "stand-ins"))
        else:
            for name in setting.names:
                parties.enter_context(party(setting, "site", name))
        coordinator.wait(600)
        path = Path(folder) / "measured.json"
        if not path.exists() or os.environ.get("SHOW"):
            for log in Path(folder).glob("*.log"):
                print(log, log.read_text()[-3000:])
        return Measured(**json.loads(path.read_text()))


def _free_ports(number: int) -> int:
    """Return the first of that many ports in a row that nobody listens on."""
    for first in range(20_000, 30_000, 50):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + number):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def main() -> None:
    """Print what was measured."""
    for database in (True, False):
        found = measure(3, FLOATS_OF_A_MB, 8, database=database)
        print(database, found)
        print(statistics.median(found.rounds_s[1:]))


if __name__ == "__main__":
    main()

"""What a round costs beyond training, next to stock Flower, and the memory of the coordinator.

Run it as `python -m benchmarks.federation`, with `--overhead`, `--masked`, `--memory` or `--memory
--masked` for one of the four.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks.processes import process
from benchmarks.setting import Measured, Setting
from benchmarks.stock_federation import stock_federation
from benchmarks.timing import Ratio, ratios
from benchmarks.turns import Turns
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key
from lepton_fed.identity.node_key import generate_node_key

__all__ = ["beside_stock", "measure"]

FLOATS_OF_A_MB = 250_000
SECONDS = {True: 1.5, False: 1.0}
"""Most seconds a round, with SQLite and without."""
MASKED_SECONDS = 4.0
"""Most seconds of a round of masked updates."""
MODELS = 6.0
"""Most memory of a large model over that of a small one, in models."""
APART = 0.1
"""Most difference in it between few sites and many."""

_LIMIT_S = 1800.0


def make_keys(setting: Setting) -> None:
    """Make everybody's keys and certificates."""
    setting.key("").mkdir(parents=True)
    make_certificates(setting.key("tls"), [])
    generate_key(setting.key("coordinator.pem"))
    for name in setting.names:
        generate_key(setting.key(f"{name}.pem"))
        generate_node_key(setting.key(f"{name}.node"))


@contextlib.contextmanager
def federation(setting: Setting, *, stand_ins: bool = False) -> Iterator[Callable[[], Measured]]:
    """Run a federation; yield what waits for its end and returns what its coordinator measured.

    Args:
        setting: The federation; its keys are made.
        stand_ins: One process answers for all sites, instead of a SuperNode and a worker each.
    """

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.federation_parties", words[0],
                   json.dumps(asdict(setting)), *words[1:]]  # fmt: skip
        return parties.enter_context(process(command, folder / f"{'-'.join(words)}.log"))

    folder = Path(setting.folder)
    with contextlib.ExitStack() as parties:
        coordinator = start("coordinator")
        if stand_ins:
            start("stand-ins")
        else:
            for name in setting.names:
                start("site", name)
        yield partial(_measured, coordinator, folder / "measured.json")


def measure(
    sites: int,
    floats: int,
    rounds: int,
    *,
    database: bool = True,
    stand_ins: bool = True,
    masked: bool = False,
) -> Measured:
    """Run rounds one after another and return what the coordinator measured."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            folder, _free_ports(sites + 1), sites, floats, rounds, database, masked=masked
        )
        make_keys(setting)
        with _logs_shown(setting), federation(setting, stand_ins=stand_ins) as measured:
            return measured()


def beside_stock(
    sites: int, floats: int, rounds: int, *, database: bool, masked: bool = False
) -> tuple[Measured, list[tuple[float, float]]]:
    """Let lepton-fed and stock Flower do rounds in turn, beside each other.

    Returns:
        What lepton-fed's coordinator measured, and seconds of lepton-fed and of stock Flower, round
        by round; one more round of each warmed up.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address, port = f"{folder}/ours.turns", _free_ports(2 * (sites + 1))
        ours = Setting(str(folder), port, sites, floats, rounds + 1, database, address, masked)
        stock = replace(ours, port=port + sites + 1, turns=f"{folder}/stock.turns")
        turns = [stack.enter_context(Turns(Path(side.turns))) for side in (ours, stock)]
        make_keys(ours)
        stack.enter_context(_logs_shown(ours))
        measured = stack.enter_context(federation(ours))
        stack.enter_context(stock_federation(stock))
        for side in turns:
            side.wait()
        _, *pairs = [(turns[0].take(), turns[1].take()) for _ in range(rounds + 1)]
        return measured(), pairs


def _measured(coordinator: subprocess.Popen[bytes], path: Path) -> Measured:
    """Wait for the end of a coordinator and return what it measured."""
    if coordinator.wait(_LIMIT_S):
        raise OSError("the coordinator failed")
    found = Measured(**json.loads(path.read_text()))
    if found.refused:
        raise ValueError(f"updates were refused: {found.refused}")
    return found


@contextlib.contextmanager
def _logs_shown(setting: Setting) -> Iterator[None]:
    """Print the ends of all logs when something goes wrong."""
    try:
        yield
    except Exception:
        for log in Path(setting.folder).rglob("*.log"):
            print(log, log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise


def _free_ports(number: int) -> int:
    """Return the first of that many ports in a row that nobody listens on."""
    start = os.getpid() % 100 * 100  # two benchmarks that start at once do not meet
    for first in range(20_000 + start, 30_000 + start, 100):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + number):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def overhead(rounds: int) -> None:
    """Print a table: seconds of a round, and the ratio."""
    print(f"3 idle sites, 1 MB model, TLS, loopback; seconds a round, median of {rounds} (range)")
    print("ratio lepton-fed / stock Flower, round by round; load: of all that runs, a minute long")
    print(f"{'state':>10} {'lepton-fed':>24} {'stock':>24} {'ratio':>24}  at most")
    for database, most in SECONDS.items():
        found, pairs = beside_stock(3, FLOATS_OF_A_MB, rounds, database=database)
        state = "SQLite" if database else "in memory"
        columns = (_range([a for a, _ in pairs]), _range([b for _, b in pairs]), ratios(pairs))
        cells = " ".join(f"{_cell(column):>24}" for column in columns)
        held = _held(columns[0][1] < most)
        print(f"{state:>10} {cells}  {most} s, {held}; load {os.getloadavg()[0]:.1f} of "
              f"{os.cpu_count()}; idle {found.idle:.1%} of a core", flush=True)  # fmt: skip


def masked(rounds: int) -> None:
    """Print what a round of masked updates takes, beside stock Flower's of plain ones."""
    _, pairs = beside_stock(3, FLOATS_OF_A_MB, rounds, database=True, masked=True)
    columns = [_range(list(side)) for side in zip(*pairs, strict=True)]
    held = _held(columns[0][1] < MASKED_SECONDS)
    print("3 idle sites, 1 MB model, TLS, loopback, SQLite, secure aggregation; seconds a round")
    print(f"{_cell(columns[0])}, at most {MASKED_SECONDS} s: {held}; stock Flower, plain: "
          f"{_cell(columns[1])}; load {os.getloadavg()[0]:.1f}")  # fmt: skip


def memory(*, masked: bool = False, megabytes: int = 100) -> None:
    """Print a table: largest resident memory of the coordinator."""
    unit, rows = "models", [(1, 3, 3), (megabytes, 3, 3), (megabytes, 30, 2), (1000, 3, 1)]
    if masked:  # a sum has as many words of 32 bits as the model has numbers
        unit, rows = "ring vectors", [(1, 3, 3), (1, 30, 1), (megabytes, 3, 1), (megabytes, 30, 1)]
    print("stand-ins for sites, SQLite; largest resident memory of the coordinator, and how many")
    print(f"{unit} it is above that with the model of 1 MB and as many sites, where there is one")
    print(f"{'model':>8} {'sites':>6} {'rounds':>7} {'s/round':>8} {'MiB':>7} {unit:>12}")
    base: dict[int, int] = {}
    over: list[float] = []
    for size, sites, rounds in rows:
        found = measure(sites, size * FLOATS_OF_A_MB, rounds, masked=masked)
        peak = found.peak_kib
        over.append((peak - base.get(sites, base.get(3, peak))) * 1024 / (size * 1e6))
        if size == 1:
            base[sites], over[-1] = peak, 0.0
        print(f"{size:>5} MB {sites:>6} {rounds:>7} {statistics.median(found.rounds_s):>8.1f} "
              f"{peak // 1024:>7} {over[-1]:>12.2f}", flush=True)  # fmt: skip
    few, many = (over[2], over[3]) if masked else (over[1], over[2])
    apart = abs(many - few) / few
    print(f"at most {MODELS:.0f} {unit}: {_held(max(over) <= MODELS)}; "
          f"30 sites against 3: {many / few:.2f}, {_held(apart <= APART)}")  # fmt: skip


def _range(values: list[float]) -> Ratio:
    return min(values), statistics.median(values), max(values)


def _cell(found: Ratio) -> str:
    low, middle, high = found
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _held(holds: bool) -> str:
    return "held" if holds else "MISSED"


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overhead", action="store_true", help="only the overhead of a round")
    parser.add_argument("--masked", action="store_true", help="only a round of masked updates")
    parser.add_argument("--memory", action="store_true", help="only the coordinator's memory; "
                        "with --masked, that of masked updates")  # fmt: skip
    parser.add_argument("--megabytes", type=int, default=100, help="size of the large model in "
                        "--memory, in MB (default: 100)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count (default: 8)")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the parties too
    every = not (wanted.overhead or wanted.masked or wanted.memory)
    if wanted.overhead or every:
        overhead(wanted.rounds)
    if (wanted.masked and not wanted.memory) or every:
        masked(wanted.rounds)
    if wanted.memory or every:
        memory(masked=wanted.masked, megabytes=wanted.megabytes)
    if every:
        memory(masked=True, megabytes=wanted.megabytes)


if __name__ == "__main__":
    main()

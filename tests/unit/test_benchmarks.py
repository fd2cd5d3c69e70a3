from __future__ import annotations

import importlib
import socket
import threading
import tomllib
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks import stock_federation
from benchmarks.setting import Setting
from benchmarks.stock_app import InTurn
from benchmarks.timing import ratios
from benchmarks.turns import Turns, Waiting
from lepton_fed.flower.compat import set_identity
from lepton_fed.flower.grid import InProcessGrid

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_can_be_imported(path: Path) -> None:
    assert importlib.import_module(f"benchmarks.{path.stem}").__doc__


def test_make_bench_runs_every_benchmark() -> None:
    written = (ROOT / "Makefile").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        runs = "\ndef main()" in path.read_text() and path.stem != "federation_parties"
        assert (f"-m benchmarks.{path.stem}\n" in written) == runs, path


def test_ratios_are_told_pair_by_pair() -> None:
    assert ratios([(1.0, 2.0), (9.0, 3.0), (1.0, 1.0)]) == (0.5, 1.0, 3.0)


def test_rounds_are_done_one_at_a_time_and_their_seconds_told(tmp_path: Path) -> None:
    began: list[int] = []

    def rounds(address: Path) -> None:
        waiting = Waiting(address)
        for number in (1, 2):
            waiting.wait()
            began.append(number)
            waiting.done(number / 4)
        waiting.close()

    with Turns(tmp_path / "turns", limit_s=20) as turns:
        other = threading.Thread(target=rounds, args=(tmp_path / "turns",))
        other.start()
        turns.wait()
        assert began == []
        assert turns.take() == 0.25
        assert began == [1]
        assert turns.take() == 0.5
        other.join()
        with pytest.raises(ConnectionError):  # the other has ended
            turns.take()


def test_nobody_waits_for_a_turn_that_cannot_come(tmp_path: Path) -> None:
    with Turns(tmp_path / "turns", limit_s=20) as turns:
        waiting = Waiting(tmp_path / "turns")
        turns.wait()
    with pytest.raises(ConnectionError, match="nobody"):
        waiting.wait()
    waiting.close()


def test_stock_flower_averages_in_turn_and_tells_each_round() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        strategy = InTurn(2, theirs)
        ours.sendall(b"..")
        arrays, grid = ArrayRecord(), InProcessGrid(stock_federation.stock_app.client, [{}, {}])
        told = []
        for whole in (True, False):
            asks = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
            set_identity(1, 2)
            content = RecordDict(
                {"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})}
            )
            replies = [Message(content, reply_to=ask) for ask in asks]
            strategy.aggregate_train(1, replies if whole else replies[:1])
            told.append(float(ours.recv(64)))
        assert told[0] >= 0
        assert told[1] != told[1], "a round that lacks an update is no number"


def test_the_app_of_stock_flower_is_told_its_setting(tmp_path: Path) -> None:
    setting = Setting("nowhere", 1, sites=3, floats=7, rounds=2, turns="/a/turns")
    folder = stock_federation.app(setting, tmp_path / "app")
    written = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert written["config"] == {"sites": 3, "floats": 7, "rounds": 2, "turns": "/a/turns"}
    for component in written["components"].values():
        module, name = component.split(":")
        assert (folder / f"{module}.py").exists()
        assert name in stock_federation.stock_app.__all__

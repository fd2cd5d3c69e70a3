"""A coordinator that is killed anywhere goes on and ends as if nothing had happened.

Each write to the disk and each message is a point; the run is killed before and after every one of
them, half-way through writes too, and begun again from its folder. What a kill leaves behind is
only what is on the disk: the second coordinator shares no object with the first. Real processes and
real SIGKILLs are tried in tests/faults.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np
import pytest

from lepton_fed.clients.masked import MaskedSite
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    AggregationFloor,
    ClientPrivacy,
    Privacy,
    Rounds,
    SecureAggregation,
    SimulationConf,
    StrategyConf,
)
from lepton_fed.core.exchange import MODEL, Ask, PhaseAsk, PhaseReply, Reply
from lepton_fed.core.layout import Vector
from lepton_fed.core.norms import clipped
from lepton_fed.core.task import Aggregation
from lepton_fed.errors import RunError
from lepton_fed.flower.stock import from_flower
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.runs import events, files, folder
from lepton_fed.runs.events import EventLog, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import RunSummary
from lepton_fed.server.execution import execute, recorded
from lepton_fed.server.intake import shape_of
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.server.standing import Standing
from lepton_fed.strategies.base import DELTA, Each, Needs, PlainSite, ServerState, Strategy, Sum
from lepton_fed.strategies.fedavg import fedavg
from lepton_fed.training.kit import build_kit
from tests.unit.server.masked_world import CopyingVault

ROUNDS = Rounds(count=3, fraction=0.75, quorum=2)


class Killed(BaseException):
    """The process is gone: nothing after it runs, not even what handles errors."""


class Points:
    """Counts the points of a run, and kills it at one of them.

    Args:
        at: Number of the point; 0 lets the run end.
    """

    def __init__(self, at: int = 0) -> None:
        self.names: list[str] = []
        self.at = at
        self.dead = False

    def __call__(self, name: str) -> None:
        if self.dead:  # what a dead process would do in its `finally`
            raise Killed
        self.names.append(name)
        if len(self.names) == self.at:
            self.dead = True
            raise Killed

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self(f"before {name}")
            result = function(*arguments, **named)
            self(f"after {name}")
            return result

        return wrapped


class Memory:
    """Sites that remember their newest answer, as real ones do; shared by both coordinators."""

    def __init__(self, world: Any) -> None:
        self._honest = {site: world.honest(site) for site in "abcd"}
        self._vaults = {site: CopyingVault() for site in "abcd"}
        self.identities = {site: PrivateKey.generate() for site in "abcd"}
        self.roster = {site: key.public_key() for site, key in self.identities.items()}
        self.agreement: Any = None
        self.shape: Any = None
        self._known: dict[tuple[str, int], bytes] = {}
        self.trained: list[tuple[str, int]] = []

    def answer(self, site: str, ask: Ask) -> Iterator[Reply]:
        if ask.train:
            key = site, ask.round_number
            model = ask.vectors[MODEL].tobytes()
            # A site that is asked again is asked the same, to the bit.
            assert self._known.setdefault(key, model) == model
            self.trained.append(key)
        yield from self._honest[site](ask)

    def masked(self, site: str, asked: PhaseAsk) -> PhaseReply:
        """Return what a site says that is started anew for each phase."""
        return MaskedSite(
            site, self.identities[site], self.roster, self.agreement, self.shape,
            AggregationFloor(), self._vaults[site], lambda ask: next(self.answer(site, ask)),
        ).take(asked)  # fmt: skip


class Line:
    def __init__(self, memory: Memory, points: Points) -> None:
        self._memory = memory
        self._points = points

    def sites(self) -> Sequence[str]:
        return list("abcd")

    def phase(
        self, asks: Mapping[str, PhaseAsk], deadline: object = None, answer_bytes: int = 0
    ) -> Iterator[PhaseReply]:
        for site in asks:
            self._points(f"before ask {site}")
        for site in asks:
            reply = self._memory.masked(site, asks[site])
            self._points(f"before reply {site}")
            yield reply

    def exchange(self, asks: Mapping[str, Ask], deadline: object = None) -> Iterator[Reply]:
        for site in asks:
            self._points(f"before ask {site}")
            self._points(f"after ask {site}")
        for site in asks:
            for reply in self._memory.answer(site, asks[site]):
                self._points(f"before reply {site}")
                yield reply
                self._points(f"after reply {site}")

    def take_late(self) -> list[Any]:
        return []


def run(
    world: Any,
    where: RunFolder,
    memory: Memory,
    points: Points,
    strategy: Strategy,
    privacy: Privacy | None = None,
) -> Any:
    """Run, or go on with, the run in a folder, as the service does."""
    conf = dataclasses.replace(SimulationConf(), task=world.task, rounds=ROUNDS, seed=7)
    privacy = privacy or Privacy()
    agreement = Agreement(where.name, world.task, StrategyConf(), ROUNDS.count, 7, privacy, 4)
    agreement = with_client_noise(agreement, world.layout.size)
    memory.agreement, memory.shape = agreement, shape_of(strategy, world.layout, world.plan)
    kit = dataclasses.replace(
        build_kit(world.task, 7), layout=world.layout, plan=world.plan, initial=world.initial
    )

    def rounds(coordinator: Coordinator, standing: Standing) -> Outcome:
        return coordinator.run(Line(memory, points), standing)

    log = EventLog(where.events)
    try:
        with recorded(log):
            log.emit = points.around("event", log.emit)  # type: ignore[method-assign]
            return execute(
                conf, strategy, kit, agreement, list("abcd"), where, log, rounds,
                keys=lambda: memory.roster, one_kind_of_device=True,
            )[1]  # fmt: skip
    finally:
        log._file.close()  # as the system does for a dead process


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Points], None]:
    """Put points around every write to the disk, and in the middle of the longer ones."""

    def put(points: Points) -> None:
        monkeypatch.undo()
        replace, fsync = Path.replace, os.fsync

        def halfway(file: Any, content: bytes) -> None:
            points("before append")
            file.write(content[: len(content) // 2])
            points("half of append")
            file.write(content[len(content) // 2 :])
            points("after append")

        monkeypatch.setattr(folder, "append", halfway)
        monkeypatch.setattr(events, "append", halfway)
        monkeypatch.setattr(Path, "replace", points.around("rename", replace))
        monkeypatch.setattr(files.os, "fsync", points.around("sync", fsync))
        monkeypatch.setattr(Path, "unlink", points.around("unlink", Path.unlink))

    return put


def whole(world: Any, where: RunFolder, summary: RunSummary) -> dict[str, Any]:
    """Return what two runs that did the same thing share, times and names aside."""
    table = list(csv.reader((where.path / "metrics.csv").read_text().splitlines()))
    log = [e for e in read_events(where.events, summary.events) if e["event"] == "round.closed"]
    closed = {e["round"]: (e["sites"], e["model"], e["digest"]) for e in log}
    once = [e["round"] for e in log]
    assert once == sorted(set(once)), "a round was closed twice"
    assert not list(where.path.rglob("*.partial"))
    model, _ = files.read_tensors(where.path / "model.safetensors")
    return {
        "digest": summary.digest,
        "model": {name: value.tobytes() for name, value in model.items()},
        "metrics": sorted(map(tuple, table[1:])),
        "overall": summary.metrics,
        "rounds": {site.name: (site.rounds, site.metrics) for site in summary.sites},
        "closed": closed,
    }


@dataclasses.dataclass(frozen=True)
class Momentum:
    """A server rule with a state that a resumed run must have."""

    needs: Needs = "sum"

    def init(self, model: Vector) -> ServerState:
        return {"velocity": np.zeros_like(model)}

    def sends(self, state: ServerState) -> Mapping[str, Vector]:
        return {}

    def step(
        self, state: ServerState, model: Vector, aggregate: Sum | Each
    ) -> tuple[ServerState, Vector]:
        assert isinstance(aggregate, Sum)
        velocity = (0.5 * state["velocity"] + aggregate.mean[DELTA]).astype(np.float32)
        return {"velocity": velocity}, model + velocity


_STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": fedavg,
    "momentum": lambda: Strategy("momentum", PlainSite(), Momentum()),
    "stock": lambda: from_flower(stock.FedAdam(eta=0.1)),
}


@pytest.mark.parametrize("name", _STRATEGIES)
def test_a_run_killed_at_any_point_ends_as_an_undisturbed_one(
    world: Any, tmp_path: Path, watch: Callable[[Points], None], name: str
) -> None:
    strategy = _STRATEGIES[name]

    def made(number: int) -> RunFolder:
        found = RunFolder.create(tmp_path / str(number), "test", "conf: true\n")
        assert isinstance(found, RunFolder)
        return found

    points = Points()
    undisturbed, memory = made(0), Memory(world)
    watch(points)
    expected = whole(world, undisturbed, run(world, undisturbed, memory, points, strategy()))
    names, trained = points.names, set(memory.trained)
    for kind in ("rename", "sync", "append", "event", "ask", "reply"):
        assert any(kind in name for name in names), kind
    # Every point with one strategy; with the others, which differ in their state only, every fifth.
    for at in range(1, len(names) + 1, 1 if name == "fedavg" else 5):
        where, memory = made(at), Memory(world)
        points = Points(at)
        watch(points)
        with pytest.raises(Killed):
            run(world, where, memory, points, strategy())
        watch(Points())
        found = whole(world, where, run(world, where, memory, Points(), strategy()))
        assert found == expected, f"killed at point {at}, {names[at - 1]}"
        assert set(memory.trained) == trained


def test_a_masked_run_killed_at_any_point_ends_as_an_undisturbed_one(
    world: Any, tmp_path: Path, watch: Callable[[Points], None]
) -> None:
    """Sums of three of four sites; what is on disk of a round goes on with the same ones."""
    privacy = Privacy(secure_aggregation=SecureAggregation(enabled=True))

    def made(number: int) -> RunFolder:
        return RunFolder.create(tmp_path / str(number), "test", "conf: true\n")

    points = Points()
    undisturbed, memory = made(0), Memory(world)
    watch(points)
    summary = run(world, undisturbed, memory, points, fedavg(), privacy)
    expected, names = whole(world, undisturbed, summary), points.names
    assert summary.metrics
    assert not list(undisturbed.masked.iterdir())
    trained = sorted(memory.trained)
    assert len(trained) == len(set(trained)) == 9, "each of a cohort, once a round"
    last = len(names) - 20  # the end of a run, which may come twice, is tried more closely
    for at in (*range(1, last, 29), *range(last, len(names) + 1, 2)):
        where, memory = made(at), Memory(world)
        points = Points(at)
        watch(points)
        with pytest.raises(Killed):
            run(world, where, memory, points, fedavg(), privacy)
        watch(Points())
        again = where.read_summary()  # one that is there is not made again, as in the service
        again = again or run(world, where, memory, Points(), fedavg(), privacy)
        assert whole(world, where, again) == expected, f"killed at point {at}, {names[at - 1]}"
        assert sorted(memory.trained) == trained, "nothing is trained twice"


class MovingNorm(Memory):
    """Sites that are told a norm in each round, and remember which."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.told: dict[int, set[float]] = {}

    def answer(self, site: str, ask: Ask) -> Iterator[Reply]:
        for reply in super().answer(site, ask):
            if reply.update is not None:
                short, norm = clipped(reply.update.vectors[DELTA], ask.clip)
                update = dataclasses.replace(
                    reply.update, vectors={DELTA: short}, norms={DELTA: norm}
                )
                reply = dataclasses.replace(reply, update=update)
            yield reply

    def masked(self, site: str, asked: PhaseAsk) -> PhaseReply:
        if asked.ask.train:
            self.told.setdefault(asked.ask.round_number, set()).add(asked.ask.clip)
        return super().masked(site, asked)


@pytest.mark.parametrize("noise", ["shared", "coordinator"])
def test_a_run_that_goes_on_asks_for_the_norm_that_the_last_round_led_to(
    world: Any, tmp_path: Path, watch: Callable[[Points], None], noise: str
) -> None:
    """Also in a round that is done again: every site is told one norm in it, before and after."""
    client = ClientPrivacy(enabled=True, epsilon=50.0, clip=0.7, quantile=0.5, noise=noise)
    privacy = Privacy(secure_aggregation=SecureAggregation(enabled=True, bits=24), client=client)
    world.task = dataclasses.replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    world.weight = lambda site: 1.0

    def made(number: int) -> tuple[RunFolder, MovingNorm]:
        return RunFolder.create(tmp_path / str(number), "test", "conf: true\n"), MovingNorm(world)

    points = Points()
    where, memory = made(0)
    watch(points)
    run(world, where, memory, points, fedavg(), privacy)
    for at in range(1, len(points.names) + 1, 17):
        where, memory = made(at)
        died = Points(at)
        watch(died)
        with pytest.raises(Killed):
            run(world, where, memory, died, fedavg(), privacy)
        watch(Points())
        summary = where.read_summary()
        summary = summary or run(world, where, memory, Points(), fedavg(), privacy)
        closed = [e for e in read_events(where.events) if e["event"] == "round.closed"]
        after = {event["round"]: event["clip"] for event in closed}
        assert list(after) == [1, 2, 3]
        assert len({client.clip, *after.values()}) == 4, "each round moves it"
        told = {number: {norm} for number, norm in zip((2, 3), (after[1], after[2]), strict=True)}
        assert memory.told == {1: {client.clip}, **told}, f"killed at {at}"
        assert summary.client is not None
        assert (summary.client.quantile, summary.client.last_clip) == (0.5, after[3])


def test_a_broken_newest_checkpoint_is_passed_over_for_the_one_before(
    world: Any, tmp_path: Path
) -> None:
    where, memory = RunFolder.create(tmp_path, "test", "conf: true\n"), Memory(world)
    summary = run(world, where, memory, Points(), fedavg())
    newest = where.path / "checkpoints" / "round-0003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    (where.path / "summary.json").unlink()
    again = run(world, where, Memory(world), Points(), fedavg())
    assert again.digest == summary.digest
    assert [e["round"] for e in read_events(where.events) if e["event"] == "run.resumed"] == [2]


@pytest.mark.parametrize("spoil", ["cut", "another task", "no record"])
def test_checkpoints_that_cannot_be_gone_on_from_are_named_and_kept(
    world: Any, tmp_path: Path, spoil: str
) -> None:
    where = RunFolder.create(tmp_path, "test", "conf: true\n")
    run(world, where, Memory(world), Points(), fedavg())
    (where.path / "summary.json").unlink()
    for path in (where.path / "checkpoints").iterdir():
        arrays, about = files.read_tensors(path)
        if spoil == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        elif spoil == "another task":
            files.write_tensors(path, arrays, about | {"task": "0" * 64})
        else:
            del about["record"]
            files.write_tensors(path, arrays, about)
    before = {path: path.read_bytes() for path in (where.path / "checkpoints").iterdir()}
    with pytest.raises(RunError, match="LF5216"):
        run(world, where, Memory(world), Points(), fedavg())
    assert {path: path.read_bytes() for path in (where.path / "checkpoints").iterdir()} == before


@pytest.mark.parametrize("gone", ["checkpoints", "newest two", "log"])
def test_a_run_of_which_something_was_taken_away_is_not_begun_anew(
    world: Any, tmp_path: Path, gone: str
) -> None:
    """It would train from the first model again, on sites that have answered those rounds."""
    where = RunFolder.create(tmp_path, "test", "conf: true\n")
    run(world, where, Memory(world), Points(), fedavg())
    (where.path / "summary.json").unlink()
    checkpoints = sorted((where.path / "checkpoints").iterdir())
    if gone == "log":
        where.events.unlink()
    elif gone == "checkpoints":
        for path in checkpoints:
            path.unlink()
    else:
        checkpoints[0].rename(checkpoints[0].with_name("round-0001.safetensors"))
        arrays, about = files.read_tensors(checkpoints[0].with_name("round-0001.safetensors"))
        files.write_tensors(
            checkpoints[0].with_name("round-0001.safetensors"), arrays, about | {"round": "1"}
        )
        checkpoints[1].unlink()
    with pytest.raises(RunError, match="LF5216"):
        run(world, where, Memory(world), Points(), fedavg())

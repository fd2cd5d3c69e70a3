"""Stock strategies of flwr as the server half of a strategy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np
import pytest

from lepton_fed.config import plugins
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, Rounds, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask, Reply, Update
from lepton_fed.core.layout import Layout
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.pace import Deadline
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.errors import ConfError, Refused, RunError
from lepton_fed.flower.stock import from_flower
from lepton_fed.runs.events import EventLog, read_events
from lepton_fed.runs.files import read_tensors, write_tensors
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.strategies.base import DELTA, ServerState, Strategy, Sum
from lepton_fed.strategies.fedavg import fedavg

SIZE = 11


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Updates:
    """A round of updates that can be read one by one."""

    def __init__(self, sites: int, round_number: int = 1) -> None:
        rng = np.random.default_rng(round_number)
        names = [f"s{number}" for number in range(sites)]
        self.round_number = round_number
        self.deltas = {name: rng.normal(size=SIZE).astype(np.float32) for name in names}
        self.weights = {name: 1.0 + number for number, name in enumerate(names)}

    @property
    def contributors(self) -> tuple[str, ...]:
        return tuple(sorted(self.deltas))

    def weight(self, site: str) -> float:
        return self.weights[site]

    def read(self, site: str, vector: str, part: slice) -> np.ndarray[Any, Any]:
        assert vector == DELTA
        return self.deltas[site][part].copy()

    def models(self, start: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array([start + self.deltas[site] for site in self.contributors])

    def mean(self) -> Sum:
        deltas = [self.deltas[site].astype(np.float64) for site in self.contributors]
        weights = [self.weights[site] for site in self.contributors]
        mean = np.average(deltas, axis=0, weights=weights)
        sites = self.contributors
        return Sum(self.round_number, {DELTA: mean}, sites, 1.0, len(sites))


def model() -> np.ndarray[Any, Any]:
    return np.random.default_rng(99).normal(size=SIZE).astype(np.float32)


def named(name: str, **arguments: object) -> Strategy:
    """The strategy as a conf names it."""
    given = {"strategy": name, "arguments": arguments}
    found = plugins.call("strategies", "flower", given, key="strategy.arguments")
    assert isinstance(found, Strategy)
    return found


def test_stock_averaging_is_close_to_ours() -> None:
    updates = Updates(5)
    _, theirs = named("FedAvg").server.step({}, model(), updates)
    _, ours = fedavg().server.step({}, model(), updates.mean())
    assert theirs.dtype == np.float32
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_the_stock_median_is_numpys() -> None:
    updates = Updates(5)
    _, moved = named("FedMedian").server.step({}, model(), updates)
    np.testing.assert_array_equal(moved, np.median(updates.models(model()), axis=0))


def test_stock_krum_takes_the_model_of_one_site_and_not_the_outliers() -> None:
    updates = Updates(7)
    updates.deltas["s3"] = np.full(SIZE, 50, np.float32)
    _, moved = named("Krum", num_malicious_nodes=1).server.step({}, model(), updates)
    near = [np.abs(each - moved).max() < 1e-6 for each in updates.models(model())]
    assert near.count(True) == 1
    assert not near[3]


def test_a_server_optimiser_keeps_its_momentum_between_rounds() -> None:
    strategy = named("FedAdam", eta=0.1)
    start = model()
    state, first = strategy.server.step({}, start, Updates(3))
    _, second = strategy.server.step(state, first, Updates(3, round_number=2))
    _, fresh = named("FedAdam", eta=0.1).server.step({}, first, Updates(3, round_number=2))
    assert np.abs(first - start).max() > 0.01
    assert not np.allclose(second, fresh)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FedAdam", {"eta": 0.1}),
        ("FedYogi", {"eta": 0.1}),
        ("FedAdagrad", {"eta": 0.1}),
        ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    ],
)
def test_a_checkpoint_holds_the_state_of_a_stock_strategy(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    def rounds(kept: Callable[[ServerState], ServerState]) -> np.ndarray[Any, Any]:
        state: ServerState = {}
        moved = model()
        for number in (1, 2, 3, 4):
            # A new object each round, as in a new process: nothing hides in it.
            server = named(name, **arguments).server
            state, moved = server.step(kept(state), moved, Updates(3, round_number=number))
        return moved

    def through_a_file(state: ServerState) -> ServerState:
        write_tensors(tmp_path / "state", {"model": model(), **state}, {})
        found, _ = read_tensors(tmp_path / "state")
        del found["model"]
        return found

    server, state, expected = named(name, **arguments).server, {}, model()
    for number in (1, 2, 3, 4):
        state, expected = server.step(state, expected, Updates(3, round_number=number))
    np.testing.assert_array_equal(rounds(through_a_file), expected)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(rounds(lambda state: {}), expected)


def test_one_step_of_stock_adam_is_that_of_its_paper() -> None:
    updates, start = Updates(3), model()
    _, moved = named("FedAdam", eta=0.1, beta_1=0.0, beta_2=0.0, tau=1e-3).server.step(
        {}, start, updates
    )
    mean = updates.mean().mean[DELTA]
    np.testing.assert_allclose(moved, start + 0.1 * mean / (np.abs(mean) + 1e-3), atol=1e-5)


def test_the_model_that_a_step_is_given_is_not_changed() -> None:
    start = model()
    named("FedAdam").server.step({}, start, Updates(3))
    assert np.array_equal(start, model())


WAITING = [
    ("FedAvg", {}, 1),
    ("FedAvg", {"min_available_nodes": 6}, 5),
    ("FedAvg", {"min_train_nodes": 6}, 5),
    ("FedAdam", {"min_available_nodes": 4, "min_train_nodes": 3}, 3),
    ("FedAvg", {"fraction_train": 1.5}, 4),
]


@pytest.mark.parametrize(("name", "arguments", "sites"), WAITING)
def test_with_fewer_sites_than_it_waits_for_the_model_stays(
    name: str, arguments: dict[str, Any], sites: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lepton_fed.strategy"):
        _, moved = named(name, **arguments).server.step({}, model(), Updates(sites))
    assert np.array_equal(moved, model())
    assert "strategy.below_minimum round=1" in caplog.text


def test_flwrs_dp_wrappers_are_refused_because_their_noise_can_be_seeded() -> None:
    wrapped = stock.DifferentialPrivacyServerSideFixedClipping(stock.FedAvg(), 1.0, 1.0, 4)
    with pytest.raises(Refused) as refusal:
        from_flower(wrapped)
    assert refusal.value.code == "LF4303"


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_all_admitted_updates_count_whatever_fraction_it_would_have_asked(fraction: float) -> None:
    updates = Updates(4)
    _, moved = named("FedAvg", fraction_train=fraction).server.step({}, model(), updates)
    _, ours = fedavg().server.step({}, model(), updates.mean())
    np.testing.assert_allclose(moved, ours, atol=1e-6)


def test_a_strategy_that_looks_for_weights_under_another_name_finds_them() -> None:
    updates = Updates(3)
    _, moved = named("FedAvg", weighted_by_key="rows").server.step({}, model(), updates)
    _, ours = fedavg().server.step({}, model(), updates.mean())
    np.testing.assert_allclose(moved, ours, atol=1e-6)


def test_a_strategy_that_wants_what_sites_do_not_send_is_named() -> None:
    strategy = named("QFedAvg", client_learning_rate=0.1)
    with pytest.raises(RunError) as caught:
        strategy.server.step({}, model(), Updates(3))
    (problem,) = caught.value.problems
    assert problem.code == "LF5305"
    assert problem.what.startswith("QFedAvg cannot aggregate: ")
    assert "train_loss" in problem.what or "loss" in problem.what


def test_it_needs_single_updates_and_refuses_a_sum() -> None:
    strategy = from_flower(stock.FedMedian())
    assert strategy.name == "flower:FedMedian"
    assert strategy.server.needs == "each"
    assert tuple(strategy.site.vectors) == (DELTA,)
    with pytest.raises(TypeError, match="needs single updates"):
        strategy.server.step({}, model(), Updates(3).mean())


@pytest.mark.parametrize(
    "name",
    [
        "FedAvgg",
        "",
        "Result",
        "__all__",
        "FedXgbBagging",
        "FedXgbCyclic",
        "DifferentialPrivacyServerSideFixedClipping",
    ],
)
def test_a_name_that_is_no_strategy_is_a_located_error(name: str) -> None:
    with pytest.raises(ConfError) as caught:
        named(name)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1103", "strategy.arguments.strategy")
    assert repr(name) in problem.what


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FedAvg", {"eta": 0.1}),
        ("Strategy", {}),
        ("QFedAvg", {}),
    ],
)
def test_arguments_that_it_refuses_are_a_located_error(
    name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfError) as caught:
        named(name, **arguments)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1104", "strategy.arguments.arguments")
    assert problem.what.startswith(f"{name} refuses its arguments: ")


class Watching(stock.FedAvg):
    """A stock strategy that remembers what it was shown."""

    def __deepcopy__(self, memo: object) -> Watching:
        return self  # the test looks at what this very object was shown

    def __init__(self) -> None:
        super().__init__(min_train_nodes=1, min_available_nodes=1)
        self.shown: list[np.ndarray[Any, Any]] = []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        for reply in replies:
            self.shown += reply.content["arrays"].to_numpy_ndarrays()
        return super().aggregate_train(server_round, replies)


class Sites:
    """Four sites in memory; what one of them sends can be changed."""

    def __init__(self, layout: Layout, bad: dict[str, Any]) -> None:
        self.layout, self.bad = layout, bad

    def sites(self) -> Sequence[str]:
        return ["a", "b", "c", "d"]

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        del deadline
        for number, (site, ask) in enumerate(asks.items()):
            delta = np.full(SIZE, number, np.float32) - ask.vectors[MODEL]
            fields = {"vectors": {DELTA: delta}, "weight": 1.0} | self.bad.get(site, {})
            yield Reply(site, update=Update(self.layout.digest, **fields))

    def take_late(self) -> list[Any]:
        return []


def coordinated(strategy: Strategy, bad: dict[str, Any], tmp_path: Path) -> tuple[Outcome, Any]:
    layout = Layout.of([("w", "shared", np.zeros(SIZE, np.float32))])
    folder = RunFolder.create(tmp_path, "test", "")
    log = EventLog(folder.events)
    rounds = Rounds(count=2, evaluate=False)
    task = Task(aggregation=Aggregation(norm_bound=100.0))
    agreement = Agreement(folder.name, task, StrategyConf(), 2, 1, Privacy())
    plan = MetricsPlan.of(task)
    coordinator = Coordinator(agreement, rounds, layout, plan, strategy, folder=folder, log=log)
    start = coordinator.start(np.zeros(SIZE, np.float32))
    outcome = coordinator.run(Sites(layout, bad), start)
    log.close()
    assert not (folder.path / "spill").exists()
    return outcome, read_events(folder.events)


def test_a_bad_reply_never_reaches_a_stock_strategy(tmp_path: Path) -> None:
    bad = {
        "b": {"vectors": {DELTA: np.array([math.nan] + [0.0] * (SIZE - 1), np.float32)}},
        "c": {"weight": -1.0},
        "d": {"vectors": {DELTA: np.full(SIZE, 1e30, np.float32)}},
    }
    watching = Watching()
    outcome, events = coordinated(from_flower(watching), bad, tmp_path)
    assert len(watching.shown) == 2
    assert all((each == 0).all() for each in watching.shown)  # the model of site a
    assert (outcome.model == 0).all()
    refused = [(e["round"], e["site"], e["code"]) for e in events if e["event"] == "reply.refused"]
    assert refused == [
        (number, site, code)
        for number in (1, 2)
        for site, code in (("b", "LF4405"), ("c", "LF4403"), ("d", "LF4406"))
    ]


def test_a_stock_strategy_runs_under_our_round_loop(tmp_path: Path) -> None:
    watching = Watching()
    outcome, events = coordinated(from_flower(watching), {}, tmp_path)
    assert [round(float(each[0])) for each in watching.shown] == [0, 1, 2, 3] * 2  # by site's name
    np.testing.assert_allclose(outcome.model, 1.5, rtol=1e-6)  # sites end at 0, 1, 2 and 3
    closed = [e for e in events if e["event"] == "round.closed"]
    assert [e["sites"] for e in closed] == [["a", "b", "c", "d"]] * 2


def test_one_object_used_for_two_runs_starts_afresh(tmp_path: Path) -> None:
    strategy = from_flower(stock.FedAdam(eta=0.1))
    first, _ = coordinated(strategy, {}, tmp_path / "first")
    second, _ = coordinated(strategy, {}, tmp_path / "second")
    assert first.digest == second.digest

from __future__ import annotations

import csv
import itertools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.schema import Rounds
from lepton_fed.core.encoding import plan_encoding
from lepton_fed.core.exchange import MODEL, Ask, Reply
from lepton_fed.core.layout import vector_digest
from lepton_fed.core.run_digest import RunDigest
from lepton_fed.errors import RunError, TaskError
from lepton_fed.runs.files import read_tensors
from lepton_fed.server.select import select_cohort
from lepton_fed.strategies.base import DELTA, Each, PlainSite, Strategy, Sum
from lepton_fed.strategies.fedavg import AddMean

SITES = list("abcd")


def silent(ask: Ask) -> list[Reply]:
    del ask
    return []


def test_every_order_of_replies_gives_the_same_model_and_digest(world: Any) -> None:
    found = set()
    for order in itertools.islice(itertools.permutations(SITES), 0, 24, 3):
        transport = world.transport()
        transport.order = lambda sites, order=order: [site for site in order if site in sites]
        outcome = world.run(transport)
        table = (world.folder.path / "metrics.csv").read_text().splitlines()
        values = "\n".join(sorted(table))
        found.add((outcome.model.tobytes(), outcome.digest, json.dumps(outcome.metrics), values))
    assert len(found) == 1


def test_a_round_adds_the_weighted_mean_of_the_updates(world: Any) -> None:
    outcome = world.run(world.transport(), Rounds(count=1))
    ask = Ask("", "", 1, True, False, {MODEL: world.initial})
    deltas = [world.honest(site)(ask)[0].update.vectors[DELTA] for site in SITES]
    mean = np.average(deltas, axis=0, weights=[world.weight(site) for site in SITES])
    np.testing.assert_allclose(outcome.model, world.initial + mean, atol=1e-6)


def test_the_run_digest_is_over_task_seed_contributors_and_models(world: Any) -> None:
    absent = world.honest("b")
    once = world.transport(b=lambda ask: [] if ask.round_number == 2 else absent(ask))
    outcome = world.run(once, seed=9)
    expected = RunDigest(world.task.digest, 9)
    closed = world.events("round.closed")
    assert [event["sites"] for event in closed] == [SITES, ["a", "c", "d"], SITES]
    for event in closed:
        expected.add_round(event["round"], event["sites"], event["model"])
        assert event["digest"] == expected.value
    assert outcome.digest == expected.value
    assert event["model"] == vector_digest(world.layout, outcome.model)


def test_another_seed_gives_another_digest(world: Any) -> None:
    digests = {world.run(world.transport(), Rounds(count=1), seed=seed).digest for seed in (1, 2)}
    assert len(digests) == 2


def test_asks_say_what_is_wanted_of_whom(world: Any) -> None:
    transport = world.transport()
    world.run(transport, Rounds(count=3, fraction=0.5), seed=6)
    *training, last = transport.asked
    for number, (sites, ask) in enumerate(training, start=1):
        assert sites == select_cohort(SITES, 2, 6, number)
        assert ask.round_number == number
        assert (ask.train, ask.evaluate) == (True, True)
        assert (ask.agreement, ask.layout) == (world.agreement.digest, world.layout.digest)
    assert last[0] == tuple(SITES)
    assert (last[1].train, last[1].evaluate) == (False, True)


def test_the_initial_model_is_not_changed(world: Any) -> None:
    before = world.initial.copy()
    transport = world.transport()
    world.run(transport)
    assert transport.asked[0][1].vectors[MODEL].tobytes() == before.tobytes()
    assert world.initial.tobytes() == before.tobytes()


def test_updates_are_let_go_of_as_they_are_added(world: Any) -> None:
    """No list of updates is held: at most the one in hand is alive."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def watched(site: str) -> Any:
        def answer(ask: Ask) -> Iterator[Reply]:
            nonlocal most
            (reply,) = world.honest(site)(ask)
            if reply.update is not None:
                alive.append(weakref.ref(reply.update.vectors[DELTA]))
            yield reply
            del reply
            most = max(most, sum(ref() is not None for ref in alive))

        return answer

    world.run(world.transport(**{site: watched(site) for site in SITES}))
    assert len(alive) == 12
    assert most == 1


def test_below_the_quorum_the_model_stays_and_the_log_says_so(world: Any) -> None:
    def not_in_round_two(site: str) -> Any:
        return lambda ask: [] if ask.round_number == 2 and ask.train else world.honest(site)(ask)

    transport = world.transport(a=not_in_round_two("a"), d=not_in_round_two("d"))
    outcome = world.run(transport, Rounds(count=3, quorum=3))
    (event,) = world.events("round.below_quorum")
    assert (event["round"], event["usable"], event["quorum"]) == (2, 2, 3)
    models = [event["model"] for event in world.events("round.closed")]
    assert models[0] == models[1] != models[2]
    assert world.events("round.closed")[1]["sites"] == []
    assert [outcome.record.sites[site].rounds for site in SITES] == [2, 2, 2, 2]
    assert outcome.record.sites["b"].update_bytes == 32


def test_a_quorum_that_is_just_reached_is_enough(world: Any) -> None:
    world.run(world.transport(a=silent), Rounds(count=1, quorum=3))
    assert not world.events("round.below_quorum")


def test_a_run_that_never_reaches_its_quorum_fails_and_says_where_to_look(world: Any) -> None:
    with pytest.raises(RunError) as caught:
        world.run(world.transport(a=silent, b=silent), Rounds(count=2, quorum=3))
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF5002", "rounds.quorum")
    assert problem.where == str(world.folder.events)
    assert "2 rounds" in problem.what
    assert "quorum of 3" in problem.what
    assert len(world.events("round.below_quorum")) == 2


def test_without_a_site_nothing_is_started(world: Any) -> None:
    transport = world.transport()
    transport.answers = {}
    with pytest.raises(RunError, match="no site can be reached"):
        world.run(transport)
    assert world.events() == []


def test_a_cohort_without_room_in_the_ring_is_refused(world: Any) -> None:
    with pytest.raises(TaskError) as caught:
        plan_encoding(world.task, 2**60)
    assert caught.value.code == "LF3401"
    assert plan_encoding(world.task, 1000).cohort == 1000


@dataclass
class Scripted:
    """A server rule that does what it is told in each round."""

    models: Mapping[int, Any]
    needs: Any = "sum"
    seen: list[int] = field(default_factory=list)

    def init(self, model: Any) -> Mapping[str, Any]:
        return {"steps": np.zeros((), np.int64), "momentum": np.zeros_like(model)}

    def sends(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"momentum": state["momentum"]}

    def step(self, state: Mapping[str, Any], model: Any, aggregate: Sum | Each) -> Any:
        self.seen.append(int(state["steps"]))
        after = {"steps": state["steps"] + 1, "momentum": state["momentum"] + 1}
        return after, self.models.get(aggregate.round_number, lambda m: m + np.float32(1))(model)


def scripted(models: Mapping[int, Any], name: str = "scripted") -> Strategy:
    return Strategy(name, PlainSite(), Scripted(models))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_dropped_and_the_run_goes_on(
    world: Any, value: float
) -> None:
    def spoilt(model: Any) -> Any:
        model = model.copy()
        model[3] = value
        return model

    strategy = scripted({2: spoilt})
    outcome = world.run(world.transport(), strategy=strategy)
    (event,) = world.events("round.model_not_finite")
    assert event["round"] == 2
    np.testing.assert_array_equal(outcome.model, world.initial + np.float32(1) + np.float32(1))
    assert strategy.server.seen == [0, 1, 1]  # the state of the dropped step is dropped too
    assert [event["sites"] for event in world.events("round.closed")] == [SITES, [], SITES]


def test_a_step_beyond_single_precision_is_dropped_with_any_strategy(world: Any) -> None:
    strategy = Strategy("fast", PlainSite(), AddMean(1e39))
    with pytest.raises(RunError, match="LF5002"):
        world.run(world.transport(), strategy=strategy)
    assert len(world.events("round.model_not_finite")) == 3


@pytest.mark.parametrize(
    "wrong", [lambda m: m.astype(np.float64), lambda m: m[:-1], lambda m: m[:, None]]
)
def test_a_strategy_that_returns_no_model_is_named(world: Any, wrong: Any) -> None:
    with pytest.raises(RunError) as caught:
        world.run(world.transport(), strategy=scripted({2: wrong}, "my-strategy"))
    (problem,) = caught.value.problems
    assert problem.code == "LF5003"
    assert "'my-strategy'" in problem.what
    assert "float32 (8,)" in problem.what


def test_what_a_strategy_sends_travels_beside_the_model_when_there_is_training(world: Any) -> None:
    transport = world.transport()
    world.run(transport, strategy=scripted({}))
    *training, last = transport.asked
    for number, (_, ask) in enumerate(training):
        assert sorted(ask.vectors) == ["model", "momentum"]
        assert (ask.vectors["momentum"] == number).all()
    assert list(last[1].vectors) == ["model"]


def test_the_newest_two_checkpoints_are_kept_and_can_be_read(world: Any) -> None:
    outcome = world.run(world.transport(), Rounds(count=4), strategy=scripted({}))
    folder: Path = world.folder.path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "round-0003.safetensors",
        "round-0004.safetensors",
    ]
    tensors, about = read_tensors(folder / "round-0004.safetensors")
    assert tensors[MODEL].tobytes() == outcome.model.tobytes()
    assert tensors["state/steps"].shape == ()
    assert tensors["state/steps"] == 4
    assert (tensors["state/momentum"] == 4).all()
    record = json.loads(about.pop("record"))
    assert record["contributors"] == SITES
    assert record["used"] == 4
    assert {name: site["rounds"] for name, site in record["sites"].items()} == dict.fromkeys(
        SITES, 4
    )
    assert about == {
        "round": "4",
        "digest": outcome.digest,
        "task": world.task.digest,
        "layout": world.layout.digest,
    }
    before, about = read_tensors(folder / "round-0003.safetensors")
    closed = world.events("round.closed")[2]
    assert about["digest"] == closed["digest"]
    assert vector_digest(world.layout, before[MODEL]) == closed["model"]


def test_metrics_of_a_round_are_of_the_model_after_it(world: Any) -> None:
    transport = world.transport()
    outcome = world.run(transport, Rounds(count=3))
    models = [ask.vectors[MODEL] for _, ask in transport.asked]  # after rounds 0, 1, 2 and 3
    assert models[-1].tobytes() == outcome.model.tobytes()

    with (world.folder.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["round", "site", "metric", "value"]
    found = {(int(r["round"]), r["site"], r["metric"]): float(r["value"]) for r in rows}
    assert len(found) == len(rows) == 4 * 5 * 4

    for number, model in enumerate(models):
        counts = {site: world.counts(site, model) for site in SITES}
        for site, each in counts.items():
            for metric, value in world.plan.values(each).items():
                assert found[number, site, metric] == value
        for metric, value in world.plan.values(sum(counts.values())).items():
            assert found[number, "all", metric] == pytest.approx(value, abs=1e-6)
    last = {metric: value for (number, site, metric), value in found.items()
            if (number, site) == (3, "all")}  # fmt: skip
    assert outcome.metrics == last
    assert outcome.record.sites["c"].metrics["accuracy"] == found[3, "c", "accuracy"]
    assert outcome.error_bounds.keys() == {"auc"}
    rounds = [event["round"] for event in world.events("model.evaluated")]
    assert rounds == [0, 1, 2, 3]


def test_without_evaluation_there_are_no_metrics(world: Any) -> None:
    transport = world.transport()
    outcome = world.run(transport, Rounds(count=2, evaluate=False))
    assert (outcome.metrics, outcome.error_bounds) == ({}, {})
    assert not (world.folder.path / "metrics.csv").exists()
    assert [ask.train for _, ask in transport.asked] == [True, True]


def test_sites_that_send_no_counts_are_left_out_of_the_metrics(world: Any) -> None:
    from dataclasses import replace

    def mute(site: str) -> Any:
        return lambda ask: [replace(world.honest(site)(ask)[0], counts=None)]

    world.run(world.transport(a=mute("a"), d=mute("d")))
    assert {tuple(event["sites"]) for event in world.events("model.evaluated")} == {("b", "c")}
    outcome = world.run(world.transport(**{site: mute(site) for site in SITES}))
    assert outcome.metrics == {}
    assert not world.events("model.evaluated")


@dataclass
class MedianBySlices:
    """The median of the updates, read two coordinates at a time."""

    folder: Path | None = None
    needs: Any = "each"
    read: list[tuple[int, str, slice]] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    fails: bool = False

    def init(self, model: Any) -> Mapping[str, Any]:
        return {}

    def sends(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    def step(self, state: Mapping[str, Any], model: Any, aggregate: Any) -> Any:
        sites: Sequence[str] = aggregate.contributors
        assert self.folder is not None
        assert len(list(self.folder.glob("*/spill/*"))) == len(sites)
        if self.fails:
            raise ZeroDivisionError
        moved = model.copy()
        for start in range(0, len(model), 2):
            part = slice(start, start + 2)
            rows = []
            for site in sites:
                self.read.append((aggregate.round_number, site, part))
                rows.append(aggregate.read(site, DELTA, part))
                self.weights[site] = aggregate.weight(site)
            moved[part] += np.median(rows, axis=0)
        return state, moved


def test_a_strategy_that_needs_each_update_reads_them_by_slices(world: Any) -> None:
    rule = MedianBySlices(world.root)
    outcome = world.run(world.transport(), Rounds(count=2), Strategy("median", PlainSite(), rule))
    assert len(rule.read) == 2 * 4 * 4
    assert rule.weights == {site: world.weight(site) for site in SITES}
    assert not (world.folder.path / "spill").exists()

    model = world.initial
    for number in (1, 2):
        ask = Ask("", "", number, True, False, {MODEL: model})
        deltas = [world.honest(site)(ask)[0].update.vectors[DELTA] for site in SITES]
        model = model + np.median(deltas, axis=0).astype(np.float32)
    np.testing.assert_allclose(outcome.model, model, atol=1e-6)


def test_a_strategy_that_needs_each_update_gets_only_those_that_were_admitted(world: Any) -> None:
    from dataclasses import replace

    def broken(ask: Ask) -> list[Reply]:
        (reply,) = world.honest("b")(ask)
        bad = {DELTA: np.full(8, np.nan, np.float32)}
        return [replace(reply, update=replace(reply.update, vectors=bad))] if ask.train else [reply]

    rule = MedianBySlices(world.root)
    outcome = world.run(world.transport(b=broken), strategy=Strategy("m", PlainSite(), rule))
    assert {site for _, site, _ in rule.read} == {"a", "c", "d"}
    assert np.isfinite(outcome.model).all()
    assert len(world.events("reply.refused")) == 3


def test_the_spilled_updates_are_removed_when_a_step_fails_too(world: Any) -> None:
    rule = MedianBySlices(world.root, fails=True)
    with pytest.raises(ZeroDivisionError):
        world.run(world.transport(), strategy=Strategy("median", PlainSite(), rule))
    assert not (world.folder.path / "spill").exists()


def test_a_sum_tells_its_weight_and_how_many_sites_the_run_has(world: Any) -> None:
    seen = []

    class Watching(AddMean):
        def step(self, state: Any, model: Any, aggregate: Any) -> Any:
            seen.append(aggregate)
            return super().step(state, model, aggregate)

    world.run(
        world.transport(),
        Rounds(count=2, fraction=0.5),
        Strategy("watching", PlainSite(), Watching()),
    )
    for aggregate in seen:
        assert len(aggregate.contributors) == 2
        assert aggregate.sites == 4
        weights = [world.weight(site) for site in aggregate.contributors]
        assert aggregate.weight == pytest.approx(sum(weights), rel=1e-11)

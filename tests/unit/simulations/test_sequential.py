"""A federation in one process: repeatable, better than guessing, and within its budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lepton_fed.cli.simulate import privacy_lines
from lepton_fed.clients import site as site_module
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.layout import vector_digest
from lepton_fed.errors import ConfError, DataError, LeptonError, RunError, TaskError
from lepton_fed.flower.transport import GridTransport
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of, event_of
from lepton_fed.privacy.dp.sampling import OrderedSampler
from lepton_fed.runs.events import read_events
from lepton_fed.runs.folder import list_runs
from lepton_fed.simulations.sequential import simulate
from lepton_fed.strategies.base import PlainSite, Strategy
from lepton_fed.strategies.fedavg import AddMean
from tests.ledger_entries import charges_in


def digest(loaded, **named):
    return simulate(loaded, **named).summary.digest


def rounds_of(done):
    return {site.name: site.rounds for site in done.summary.sites}


def events_of(done, kind):
    return [event for event in read_events(done.folder.events) if event["event"] == kind]


def test_two_runs_without_dp_share_their_digest_and_their_model(load):
    one, two = simulate(load()), simulate(load())
    assert one.summary.digest == two.summary.digest
    assert one.outcome.model.tobytes() == two.outcome.model.tobytes()
    assert one.summary.repeatable
    assert one.folder.path != two.folder.path


@pytest.fixture(scope="module")
def digests():
    """Every digest seen in this module, by what was run."""
    return {}


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "seed=2",
        "rounds.count=4",
        "rounds.fraction=0.7",
        "sites.names=[site-2,site-1,site-3]",
        "sites.names=[a,b,c]",
        "sites.count=2",
        "sites.partition={name: shards, arguments: {per_site: 2}}",
        "sites.held_out=0.3",
        "strategy={name: fedprox, arguments: {mu: 1.0}}",
        "strategy={name: fedavg, arguments: {server_learning_rate: 0.9}}",
        "task.training.learning_rate=0.31",
        "task.training.epochs=2",
        "task.name=other",
    ],
)
def test_a_run_of_something_else_has_another_digest(load, change, digests):
    found = digest(load(change))
    assert found not in digests.values(), digests
    digests[change] = found


def test_the_digest_does_not_depend_on_who_is_asked_first(load, monkeypatch):
    # A model with a scratch space that sites share, and a strategy that keeps state at the server.
    of = {"model": {"name": "mlp", "arguments": {"hidden": [8]}}}
    expected = digest(load(**of))
    exchange = GridTransport.exchange
    orders = []

    def backwards(self, asks, *given):
        orders.append(list(asks)[::-1])
        return exchange(self, {site: asks[site] for site in orders[-1]}, *given)

    monkeypatch.setattr(GridTransport, "exchange", backwards)
    assert digest(load(**of)) == expected
    assert orders[0] == ["site-3", "site-2", "site-1"]


def test_a_fraction_of_the_sites_takes_part_in_each_round(load):
    of = ["sites.count=5", "rounds.fraction=0.4", "rounds.count=6"]
    done, again = simulate(load(*of)), simulate(load(*of))
    cohorts = [event["cohort"] for event in events_of(done, "round.started")]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert sum(rounds_of(done).values()) == 12
    assert done.summary.digest == again.summary.digest
    assert all(site.metrics for site in done.summary.sites), "all evaluate the last model"


def test_the_record_of_a_run_is_whole(load):
    heard = []
    done = simulate(load(), listeners=(heard.append,))
    events = read_events(done.folder.events)
    assert [event["event"] for event in events] == [event["event"] for event in heard]
    assert [event["event"] for event in (events[0], events[-1])] == ["run.started", "run.finished"]
    assert done.folder.read_summary() == done.summary
    assert np.array_equal(done.folder.read_model(done.kit.layout), done.outcome.model)
    assert done.summary.model == vector_digest(done.kit.layout, done.outcome.model)
    metrics = (done.folder.path / "metrics.csv").read_text().splitlines()
    # Rounds 0 to 3, three sites and all together, the loss alone.
    assert len(metrics) == 1 + 4 * 4


def test_the_conf_of_a_run_gives_the_run_again(load):
    done = simulate(load("seed=9"))
    again = load_conf(done.folder.conf, kind=SimulationConf)
    assert digest(again) == done.summary.digest


TABLES = {
    "breast_cancer": (["accuracy", "auc"], {"epochs": 2, "batch_size": 16, "learning_rate": 0.1}),
    "wine": (["accuracy", "macro_f1"], {"epochs": 4, "batch_size": 16, "learning_rate": 0.2}),
    "diabetes": (["mae", "r2"], {"epochs": 40, "batch_size": 16, "learning_rate": 0.01}),
}


@pytest.mark.parametrize("reader", TABLES)
def test_tables_are_learned_better_than_by_guessing(load, reader):
    metrics, training = TABLES[reader]
    done = simulate(load(reader=reader, metrics=metrics, training=training))
    targets = np.concatenate([rows.held_out.targets for rows in done.population])
    found = done.summary.metrics
    assert set(found) == {"loss", *metrics}
    if reader == "diabetes":
        by_mean = np.abs(targets - targets.mean()).mean()
        assert found["mae"] < 0.85 * by_mean
        assert found["r2"] > 0.25
        assert found["loss"] < 0.75 * targets.var()
        return
    majority = np.bincount(targets).max() / len(targets)
    assert found["accuracy"] > majority + 0.2
    assert found["accuracy"] > 0.9
    if reader == "breast_cancer":
        assert found["auc"] > 0.97
        assert 0 <= done.summary.error_bounds["auc"] < 0.01


def test_images_are_learned_better_than_by_guessing(load):
    done = simulate(load("rounds.count=5", metrics=["accuracy"]))
    assert done.summary.metrics["accuracy"] > 0.8
    first = events_of(done, "model.evaluated")[0]["metrics"]["accuracy"]
    assert first < 0.3, "the model before the first round knows nothing"


def test_fedprox_by_conf_holds_sites_near_the_received_model(load):
    def travelled(*overrides):
        done = simulate(load(*overrides, "rounds.count=1", "task.training.epochs=5"))
        return np.linalg.norm(done.outcome.model - done.kit.initial)

    none = travelled("strategy={name: fedprox, arguments: {mu: 0.0}}")
    strong = travelled("strategy={name: fedprox, arguments: {mu: 2.0}}")
    assert none == travelled()
    assert 0 < strong < 0.7 * none


@pytest.mark.parametrize(
    ("arguments", "accuracy"),
    [("{strategy: FedAvg}", 0.7), ("{strategy: FedAdam, arguments: {eta: 0.05}}", 0.5)],
)
def test_a_stock_strategy_by_conf_trains(load, arguments, accuracy):
    change = f"strategy={{name: flower, arguments: {arguments}}}"
    done = simulate(load(change, metrics=["accuracy"]))
    assert done.summary.metrics["accuracy"] > accuracy
    assert done.summary.strategy.startswith("flower:")
    assert not done.summary.repeatable
    assert not list(done.folder.path.glob("spill*"))


def test_a_strategy_object_takes_the_place_of_the_one_in_the_conf(load):
    strategy = Strategy("half", PlainSite(), AddMean(0.5))
    done = simulate(load(), strategy=strategy)
    by_conf = simulate(load("strategy.arguments.server_learning_rate=0.5"))
    assert done.summary.strategy == "half"
    assert done.outcome.model.tobytes() == by_conf.outcome.model.tobytes()


def test_a_site_that_fails_in_one_round_costs_only_itself(load, monkeypatch):
    train = site_module.train

    def failing(model, layout, rows, task, rule, memory, moment, **named):
        if (moment.site, moment.round_number) == ("site-2", 2):
            raise RuntimeError("disk on fire")
        return train(model, layout, rows, task, rule, memory, moment, **named)

    monkeypatch.setattr(site_module, "train", failing)
    done = simulate(load())
    assert rounds_of(done) == {"site-1": 3, "site-2": 2, "site-3": 3}
    (refused,) = events_of(done, "reply.refused")
    assert (refused["round"], refused["site"], refused["code"]) == (2, "site-2", "LF5301")
    assert "fire" not in done.folder.events.read_text()
    closed = events_of(done, "round.closed")
    assert [event["sites"] for event in closed][1] == ["site-1", "site-3"]
    monkeypatch.undo()
    assert digest(load()) != done.summary.digest, "who contributed is in the digest"


def test_a_round_below_the_quorum_leaves_the_model_as_it_is(load, monkeypatch):
    train = site_module.train

    def failing(model, layout, rows, task, rule, memory, moment, **named):
        if moment.round_number == 2 and moment.site != "site-3":
            raise RuntimeError
        return train(model, layout, rows, task, rule, memory, moment, **named)

    monkeypatch.setattr(site_module, "train", failing)
    done = simulate(load("rounds.quorum=2"))
    models = [event["model"] for event in events_of(done, "round.closed")]
    assert models[1] == models[0] != models[2]
    assert rounds_of(done) == {"site-1": 2, "site-2": 2, "site-3": 2}
    (below,) = events_of(done, "round.below_quorum")
    assert (below["round"], below["usable"], below["quorum"]) == (2, 1, 2)


def test_a_run_that_failed_says_so_and_has_no_summary(load, tmp_path):
    @dataclass(frozen=True)
    class Exploding(PlainSite):
        def update(self, memory, delta, steps, learning_rate):
            return {"delta": delta * np.float32(np.nan)}, {}

    with pytest.raises(RunError):
        simulate(load(), strategy=Strategy("exploding", Exploding(), AddMean()))
    (folder,) = list_runs(tmp_path / "runs")
    events = read_events(folder.events)
    assert events[-1]["event"] == "run.failed"
    assert {e["code"] for e in events if e["event"] == "reply.refused"} == {"LF5312"}
    assert folder.read_summary() is None


@pytest.mark.parametrize(
    ("overrides", "kind", "code"),
    [
        (["task.model.arguments.depth=3"], ConfError, "LF1023"),
        (["strategy.arguments.mu=1"], ConfError, "LF1023"),
        (["sites.partition.name=dirichlet"], ConfError, "LF1024"),
        (["strategy={name: flower, arguments: {strategy: FedMagic}}"], ConfError, "LF1103"),
        (["device=cuda:63"], ConfError, "LF1102"),
        (["task.model={name: cnn}", "task.model.arguments={groups: 7}"], TaskError, "LF3001"),
        (["task.model.frozen=['*.weights']"], TaskError, "LF3004"),
        (["task.preprocessing=[{step: whiten}]"], TaskError, "LF3101"),
        (["task.data.target.classes=[a, b]"], DataError, "LF2012"),
        (["sites.count=1800"], DataError, "LF2050"),
        (["task.aggregation.norm_bound=1.0e-300"], TaskError, "LF3401"),
        (["privacy.record={enabled: true, epsilon: 1.0e-05}"], TaskError, "LF3301"),
        (["privacy.record.enabled=true", "task.numeric.precision=bf16"], TaskError, "LF3305"),
    ],
)
def test_a_wrong_conf_leaves_no_run_behind(load, tmp_path, overrides, kind, code):
    loaded = load(*overrides)
    with pytest.raises(kind) as caught:
        simulate(loaded)
    assert caught.value.code == code
    assert not (tmp_path / "runs").exists()


def test_a_private_run_spends_its_target_at_every_site(load, private):
    done = simulate(load(*private))
    for rows, site in zip(done.population, done.summary.sites, strict=True):
        count = len(rows.training)
        steps = round(count / 32)
        event = SampledGaussian(site.noise_multiplier, 32 / count, 3 * steps)
        assert site.epsilon == epsilon_of([event], 1e-5)
        assert 0.99 * 4 < site.epsilon <= 4
        lines = charges_in(done.folder.site(site.name))
        assert [line["round"] for line in lines] == [1, 2, 3]
        assert {line["content"] for line in lines} == {rows.training.digest}
        assert site.metrics == {}
    assert done.summary.metrics == {}
    assert (done.summary.delta, done.summary.clip) == (1e-5, 1.0)
    assert not done.summary.repeatable
    assert simulate(load(*private)).summary.digest != done.summary.digest


def test_noise_and_batches_never_come_from_the_run_s_seed(load, private):
    """Same seed, same conf, torch and numpy seeded by whoever wants to: another model each time."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what an attacker would try
        runs.append(simulate(load(*private, "seed=5")))
    assert runs[0].summary.model != runs[1].summary.model
    assert {done.summary.randomness for done in runs} == {"system"}


def test_correlated_noise_is_run_charged_and_told_as_what_it_is(load, private):
    words = ("privacy.record.mechanism=dp_ftrl", "privacy.record.sampler=full")
    done = simulate(load(*private, *words))
    for rows, site in zip(done.population, done.summary.sites, strict=True):
        charged = [event_of(entry["event"]) for entry in charges_in(done.folder.site(site.name))]
        steps = -(-len(rows.training) // 32)
        assert [(event.first, event.steps) for event in charged] == [
            (number * steps, steps) for number in range(3)
        ]
        assert {event.mechanism for event in charged} == {"dp_ftrl"}
        one = SampledGaussian(site.noise_multiplier, 1.0, 1)
        assert site.epsilon == epsilon_of(charged, 1e-5)
        assert site.epsilon == pytest.approx(epsilon_of([one], 1e-5), rel=1e-6)
        assert 0.99 * 4 < site.epsilon <= 4
    assert (done.summary.mechanism, done.summary.sampler) == ("dp_ftrl", "full")
    assert events_of(done, "run.started")[0]["mechanism"] == "dp_ftrl"
    assert "DP-FTRL: order of the rows, noise correlated" in "".join(privacy_lines(done.summary))
    assert "DP-FTRL" not in "".join(privacy_lines(simulate(load(*private)).summary))


def test_seeded_noise_repeats_and_is_called_insecure_wherever_it_is_told(load, private):
    def done(seed):
        seeded = "privacy.record.randomness=insecure_seeded"
        return simulate(load(*private, seeded, f"seed={seed}"))

    one, again, other = done(5), done(5), done(6)
    assert one.summary.model == again.summary.model != other.summary.model
    assert not one.summary.repeatable, "nobody is to rely on it"
    assert one.summary.randomness == "insecure_seeded"
    assert events_of(one, "run.started")[0]["randomness"] == "insecure_seeded"
    conf = (one.folder.path / "conf.yaml").read_text()
    assert "randomness: insecure_seeded" in conf
    assert any("INSECURE" in line for line in privacy_lines(one.summary))
    assert not any("INSECURE" in line for line in privacy_lines(simulate(load(*private)).summary))


@pytest.mark.parametrize("order", ["shuffled", "full"])
def test_an_order_is_run_and_charged_as_what_it_is(load, private, order):
    done = simulate(load(*private, f"privacy.record.sampler={order}"))
    for rows, site in zip(done.population, done.summary.sites, strict=True):
        sampler = OrderedSampler(len(rows.training), 32, order)
        event = sampler.event(site.noise_multiplier, sampler.steps_per_epoch)
        assert event.passes == 1
        assert site.epsilon == epsilon_of([event] * 3, 1e-5)
        assert 0.99 * 4 < site.epsilon <= 4
        events = [entry["event"] for entry in charges_in(done.folder.site(site.name))]
        assert {(e["sampler"], e["adjacency"]) for e in events} == {(order, "zero-out-one")}
    assert done.summary.sampler == order
    assert "zero out one record" in "".join(privacy_lines(done.summary))


def test_evaluation_leaves_a_private_run_only_if_it_is_listed(load, private):
    listed = simulate(load(*private, "privacy.outside_epsilon=[evaluation]", metrics=["accuracy"]))
    assert listed.summary.outside_epsilon == ["evaluation"]
    assert listed.summary.metrics["accuracy"] > 0.5
    silent = simulate(
        load(*private, "privacy.outside_epsilon=[evaluation]", "rounds.evaluate=false")
    )
    assert (silent.summary.outside_epsilon, silent.summary.metrics) == ([], {})
    started = events_of(listed, "run.started")[0]
    assert (started["record_dp"], started["outside_epsilon"]) == (True, ["evaluation"])


def test_a_folder_that_cannot_be_made_is_refused(load, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LeptonError) as caught:
        simulate(load())
    assert (caught.value.code, caught.value.problems[0].key) == ("LF5201", "runs")

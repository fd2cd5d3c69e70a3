"""What a site lets out: only to the agreed ask, only what was agreed, and codes for all else."""

from __future__ import annotations

import logging
import math
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fed.clients import site as site_module
from lepton_fed.clients.site import EVALUATION, Site
from lepton_fed.config import plugins
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    Budget,
    ClientPrivacy,
    Privacy,
    RecordPrivacy,
    SecureAggregation,
    StrategyConf,
)
from lepton_fed.core.exchange import MODEL, Ask, Update
from lepton_fed.core.task import (
    Aggregation,
    Column,
    DataContract,
    ModelSpec,
    Numeric,
    Step,
    Target,
    Task,
    TrainingSpec,
)
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import BudgetExceeded, DataError, LeptonError, Problem, Refused, TaskError
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.ledger.chain import Transaction
from lepton_fed.privacy.ledger.ledger import Ledger
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training.evaluation import evaluate
from lepton_fed.training.kit import build_kit
from lepton_fed.training.local import Moment, train
from tests.ledger_entries import charges_in, entries_in

ROUNDS, SEED = 3, 5
CPU = [torch.device("cpu")]
PRIVATE = "patient 4711 has 99.5"
TASK = Task(
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
    training=TrainingSpec(batch_size=8, learning_rate=0.2),
    metrics=["accuracy"],
)
DP = Privacy(RecordPrivacy(enabled=True, epsilon=3.0, delta=1e-5, clip=0.5))


def dataset(count, seed=0):
    draws = np.random.Generator(np.random.PCG64(seed))
    inputs = draws.normal(size=(count, 2)).astype(np.float32)
    return Dataset(inputs, (inputs @ np.array([1.0, -2.0]) > 0).astype(np.int64))


def agreed(task=TASK, privacy=None):
    return Agreement("run", task, StrategyConf(), ROUNDS, SEED, privacy or Privacy())


@pytest.fixture
def build(tmp_path):
    """Build sites that are closed at the end."""
    sites = []

    def one(
        task=TASK,
        rule=None,
        privacy=None,
        rows=None,
        held_out=None,
        name="north",
        kit=None,
        agreement=None,
        budget=None,
        content="d" * 64,
        named="main",
        **more,
    ):
        ledger = None
        if budget is not None:
            ledger = Ledger(
                tmp_path / name / "ledger.sqlite",
                dataset=named,
                content=content,
                epsilon=budget.epsilon,
                delta=budget.delta,
            )
        site = Site(
            name,
            kit or build_kit(task, SEED),
            rule or PlainSite(),
            dataset(40) if rows is None else rows,
            dataset(10, seed=1) if held_out is None else held_out,
            agreement or agreed(task, privacy),
            devices=CPU,
            folder=tmp_path / name,
            ledger=ledger,
            **more,
        )
        sites.append(site)
        return site

    yield one
    for site in sites:
        site.close()


def full_disk(*given, **named):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    raise error


def charged(tmp_path, name="north"):
    """The rounds that a site's ledger was charged for."""
    return [body["round"] for body in charges_in(tmp_path / name)]


KITS = {}  # by task; the coordinator's, of which only layout and first model are looked at


def ask(of=TASK, round_number=1, train=True, evaluate=False, privacy=None, **changes):
    if of.digest not in KITS:
        KITS[of.digest] = build_kit(of, SEED)
    kit = KITS[of.digest]
    asked = Ask(
        agreement=agreed(of, privacy).digest,
        layout=kit.layout.digest,
        round_number=round_number,
        train=train,
        evaluate=evaluate,
        vectors={MODEL: kit.initial.copy()},
    )
    return replace(asked, **changes)


def refusal(reply):
    assert reply.refusal is not None
    assert (reply.update, reply.counts) == (None, None)
    return reply.refusal


def test_an_agreed_ask_is_answered_with_what_training_changed(build):
    reply = build().answer(ask(evaluate=True))
    kit = build_kit(TASK, SEED)
    rows = kit.prepare(dataset(40), CPU[0])
    counts = evaluate(kit.model, kit.prepare(dataset(10, 1), CPU[0]), TASK, kit.plan, CPU[0])
    moment = Moment(SEED, 1, ROUNDS, "north")
    train(kit.model, kit.layout, rows, TASK, PlainSite(), None, moment, devices=CPU)
    trained = nn.utils.parameters_to_vector(kit.model.parameters()).detach().numpy()
    assert reply.refusal is None
    assert (reply.site, reply.update.weight, reply.update.layout) == ("north", 1, kit.layout.digest)
    assert set(reply.update.vectors) == {DELTA}
    assert reply.update.vectors[DELTA].tobytes() == (trained - kit.initial).tobytes()
    assert np.array_equal(reply.counts, counts)
    assert (reply.epsilon, reply.noise_multiplier) == (None, None)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"agreement": "0" * 64}, "LF4501"),
        ({"layout": "0" * 64}, "LF4502"),
        ({"round_number": 0}, "LF4503"),
        ({"round_number": ROUNDS + 1}, "LF4503"),
        ({"vectors": {}}, "LF4505"),
        ({"vectors": {f"v{n}": np.zeros(6, np.float32) for n in range(9)}}, "LF4505"),
        ({"vectors": {MODEL: np.zeros(5, np.float32)}}, "LF4505"),
        ({"vectors": {MODEL: np.zeros((6, 1), np.float32)}}, "LF4505"),
        ({"vectors": {MODEL: np.zeros(6, np.float64)}}, "LF4505"),
        ({"vectors": {MODEL: np.zeros(6, np.float32), "c": np.zeros(7, np.float32)}}, "LF4505"),
        ({"vectors": {MODEL: np.array([0, 0, np.nan, 0, 0, 0], np.float32)}}, "LF5302"),
        ({"vectors": {MODEL: np.full(6, np.inf, np.float32)}}, "LF5302"),
    ],
)
@pytest.mark.parametrize("privacy", [None, DP])
def test_an_ask_that_was_not_agreed_to_is_refused_and_costs_nothing(build, changes, code, privacy):
    site = build(privacy=privacy)
    for train_, evaluate_ in ((True, False), (False, True)):
        reply = site.answer(ask(train=train_, evaluate=evaluate_, privacy=privacy, **changes))
        assert refusal(reply).code == code
    assert site.epsilon == (0 if privacy else None)
    assert site.answer(ask(privacy=privacy)).update is not None, "the site goes on"


@pytest.mark.parametrize(
    "other",
    [
        {"run": "another"},
        {"task": replace(TASK, training=TrainingSpec(epochs=50))},
        {"strategy": StrategyConf("fedprox")},
        {"strategy": StrategyConf("fedavg", {"server_learning_rate": 2.0})},
        {"rounds": ROUNDS + 1},
        {"seed": SEED + 1},
        {"privacy": replace(DP, outside_epsilon=[EVALUATION])},
        {"privacy": replace(DP, record=replace(DP.record, clip=100.0))},
    ],
)
def test_an_ask_for_another_agreement_is_refused(build, other):
    site = build(privacy=DP)
    changed = replace(agreed(privacy=DP), **other)
    assert refusal(site.answer(ask(agreement=changed.digest))).code == "LF4501"
    assert site.epsilon == 0


def test_a_kit_of_another_task_is_refused(build):
    with pytest.raises(ValueError, match="another task"):
        build(kit=build_kit(replace(TASK, name="other"), SEED))


@pytest.mark.parametrize("privacy", [None, DP])
def test_a_round_is_trained_once_and_in_order(build, privacy):
    site = build(privacy=privacy)
    assert site.answer(ask(round_number=2, privacy=privacy)).update is not None
    spent = site.epsilon
    for number in (1, 2):
        assert refusal(site.answer(ask(round_number=number, privacy=privacy))).code == "LF4506"
        evaluated = site.answer(ask(round_number=number, train=False, privacy=privacy))
        assert evaluated.refusal is None, "an older model may be evaluated"
    assert site.epsilon == spent
    assert site.answer(ask(round_number=3, privacy=privacy)).update is not None


def test_a_round_that_failed_may_be_asked_for_again_and_is_charged_again(build):
    site = build(rule=Leaky(), privacy=DP)
    event = SampledGaussian(site.noise_multiplier, 8 / 40, 5)
    for times in (1, 2):
        assert refusal(site.answer(ask(privacy=DP))).code == "LF5301"
        assert site.epsilon == epsilon_of([event] * times, 1e-5)


def test_the_model_as_received_is_not_changed(build):
    asked = ask()
    before = asked.vectors[MODEL].copy()
    asked.vectors[MODEL].flags.writeable = False
    assert build().answer(asked).update is not None
    assert np.array_equal(asked.vectors[MODEL], before)


@dataclass(frozen=True)
class Leaky(PlainSite):
    """Fails with words that nobody outside may read."""

    error: type = ValueError

    def update(self, memory, delta, steps, learning_rate):
        if issubclass(self.error, LeptonError):
            raise self.error(Problem("LF2017", PRIVATE, where=PRIVATE, key=PRIVATE, remedy=PRIVATE))
        raise self.error(PRIVATE)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError, "LF5301"),
        (KeyError, "LF5301"),
        (MemoryError, "LF5301"),
        (DataError, "LF2017"),
        (Refused, "LF2017"),
    ],
)
def test_a_failure_leaves_as_a_code_and_nothing_else(build, caplog, error, code):
    site = build(rule=Leaky(error=error), privacy=DP)
    with caplog.at_level(logging.ERROR, "lepton_fed.site"):
        reply = site.answer(ask(evaluate=True, privacy=DP))
    problem = refusal(reply)
    assert problem.code == code
    assert (problem.where, problem.key, problem.remedy) == ("", "", "")
    for field in fields(reply):
        assert "4711" not in repr(getattr(reply, field.name))
    assert PRIVATE in caplog.text, "the owner reads it in the site's own log"
    assert site.epsilon > 0, "the round was charged before it failed"
    assert reply.epsilon == site.epsilon, "what it cost is said"


def test_a_failure_in_the_data_leaves_as_a_code(build, monkeypatch):
    def broken(*given, **named):
        raise RuntimeError(PRIVATE)

    monkeypatch.setattr(site_module, "train", broken)
    reply = build().answer(ask())
    assert refusal(reply).code == "LF5301"
    assert "4711" not in repr(reply)


def test_weights_that_break_leave_as_a_code(build):
    rows = dataset(40)
    rows.inputs[:, 1] = 3e38  # finite, and so is the first step; the second one is not
    assert refusal(build(rows=rows).answer(ask())).code == "LF5101"


def test_rows_that_are_not_finite_are_refused_before_anything_is_asked(build):
    rows = dataset(40)
    rows.inputs[7, 1] = np.nan
    with pytest.raises(DataError, match="LF2040"):
        build(rows=rows)


@pytest.mark.parametrize(
    ("privacy", "leaves"),
    [
        (Privacy(), True),
        (DP, False),
        (replace(DP, outside_epsilon=[EVALUATION]), True),
        (replace(DP, outside_epsilon=["histograms"]), False),
    ],
)
@pytest.mark.parametrize("train_", [True, False])
def test_counts_leave_under_dp_only_if_the_privacy_lists_them(build, privacy, leaves, train_):
    asked = ask(train=train_, evaluate=True, privacy=privacy)
    reply = build(privacy=privacy).answer(asked)
    assert reply.refusal is None
    assert (reply.counts is not None) == leaves
    assert (reply.update is not None) == train_


def test_an_ask_for_nothing_is_answered_with_nothing(build):
    reply = build(privacy=DP).answer(ask(train=False, privacy=DP))
    assert (reply.update, reply.counts, reply.refusal, reply.epsilon) == (None, None, None, 0)


def test_epsilon_after_each_round_is_the_accountant_s(build):
    site = build(privacy=DP)
    event = SampledGaussian(site.noise_multiplier, 8 / 40, 5)
    for number in range(1, ROUNDS + 1):
        reply = site.answer(ask(round_number=number, privacy=DP))
        assert reply.epsilon == epsilon_of([event] * number, 1e-5)
        assert reply.noise_multiplier == site.noise_multiplier
    assert 0.99 * 3.0 < site.epsilon <= 3.0, "the whole run takes the target, and no more"


def test_every_part_of_the_agreement_is_in_its_digest():
    one = agreed()
    others = [
        replace(one, run="another"),
        replace(one, task=replace(TASK, name="another")),
        replace(one, strategy=StrategyConf("fedprox", {"mu": 0.1})),
        replace(one, rounds=ROUNDS + 1),
        replace(one, seed=SEED + 1),
        replace(one, privacy=DP),
    ]
    assert len({each.digest for each in [one, *others]}) == 7
    assert one.digest == agreed().digest


def test_a_round_beyond_the_budget_is_refused_however_often_the_site_is_started(build):
    spent = 0.0
    for _ in range(ROUNDS):
        site = build(privacy=DP)  # it remembers no round, its ledger does
        assert site.answer(ask(privacy=DP)).update is not None
        assert site.epsilon > spent
        spent = site.epsilon
        site.close()
    site = build(privacy=DP)
    for _ in range(2):
        assert refusal(site.answer(ask(privacy=DP))).code == "LF4201"
    assert site.epsilon == spent <= 3.0
    assert site.answer(ask(train=False, privacy=DP)).refusal is None


def test_the_ledger_outlives_the_site(build):
    site = build(privacy=DP)
    site.answer(ask(privacy=DP))
    spent = site.epsilon
    site.close()
    assert build(privacy=DP).epsilon == spent


def test_a_site_whose_ledger_fails_does_not_train(build, monkeypatch, tmp_path):
    site = build(privacy=DP)
    calls = []
    monkeypatch.setattr(site_module, "train", lambda *given, **named: calls.append(1))

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "append", full_disk)
        for _ in range(2):
            assert refusal(site.answer(ask(privacy=DP))).code == "LF4202"
    assert not calls
    assert charged(tmp_path) == []


def test_what_a_ledger_holds_is_written_before_training_starts(build, monkeypatch, tmp_path):
    site = build(privacy=DP)
    lines = []

    def look(*given, **named):
        lines.append(charged(tmp_path))
        raise RuntimeError("enough")

    monkeypatch.setattr(site_module, "train", look)
    site.answer(ask(privacy=DP))
    assert lines == [[1]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"task": replace(TASK, numeric=Numeric(precision="bf16"))}, "LF3305"),
        ({"privacy": replace(DP, record=replace(DP.record, epsilon=1e-6))}, "LF3301"),
    ],
)
def test_what_does_not_go_with_dp_is_refused_before_anything_is_written(
    build, tmp_path, changes, code
):
    with pytest.raises(TaskError) as caught:
        build(**{"privacy": DP, **changes})
    assert caught.value.code == code
    assert not (tmp_path / "north").exists()


def test_a_site_without_rows_is_refused(build):
    with pytest.raises(DataError, match="LF2101"):
        build(rows=Dataset(np.empty((0, 2), np.float32), np.empty(0, np.int64)))


def test_a_site_without_held_out_rows_counts_nothing(build):
    empty = Dataset(np.empty((0, 2), np.float32), np.empty(0, np.int64))
    reply = build(held_out=empty).answer(ask(evaluate=True))
    assert not reply.counts.any()


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [
        (Aggregation(), 1.0),
        (Aggregation("rows", 1000), 40.0),
        (Aggregation("rows", 32.5), 32.0),
        (Aggregation("equal", 1000), 1.0),
    ],
)
def test_a_weight_is_one_or_the_row_count_up_to_its_cap(build, aggregation, weight):
    task = replace(TASK, aggregation=aggregation)
    assert build(task).answer(ask(task)).update.weight == weight


def test_two_sites_on_one_scratch_model_do_not_see_each_other(build):
    shared = build_kit(TASK, SEED)
    one, two = build(kit=shared), build(kit=shared, name="south", rows=dataset(30, 2))
    asks = [(one, 1), (two, 1), (one, 2)]
    together = [site.answer(ask(round_number=number)) for site, number in asks]
    by_itself, other = build(), build(name="south", rows=dataset(30, 2))
    asks = [(by_itself, 1), (other, 1), (by_itself, 2)]
    alone = [site.answer(ask(round_number=number)) for site, number in asks]
    for reply, expected in zip(together, alone, strict=True):
        assert reply.update.vectors[DELTA].tobytes() == expected.update.vectors[DELTA].tobytes()


class Counting(nn.Module):
    """Changes a buffer of its own in training, as an exponential average would."""

    def __init__(self, dtype):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros((), dtype=dtype))

    def forward(self, rows):
        if self.training:
            self.seen += 1
        return self.head(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_training_that_changes_a_buffer_of_everybody_s_is_refused(build, monkeypatch, dtype):
    monkeypatch.setattr(plugins, "call", lambda *given, **named: Counting(dtype))
    counting = replace(TASK, name=f"counting-{dtype}")
    kit = build_kit(counting, SEED)
    one, two = build(counting, kit=kit), build(counting, kit=kit, name="south")
    for site in (one, two):
        assert refusal(site.answer(ask(counting))).code == "LF5102"
        assert float(kit.model.seen) == 0, "nothing is carried from site to site"
    kept = replace(counting, model=replace(TASK.model, local=["seen"]))
    if dtype != torch.bfloat16:  # what stays at a site is kept as numpy knows it
        assert build(kept).answer(ask(kept)).update is not None


IMAGES = Task(
    data=DataContract("image", [1, 4, 4], target=Target(classes=["no", "yes"])),
    model=ModelSpec("normalised"),
    training=TrainingSpec(batch_size=8, learning_rate=0.1),
    metrics=["accuracy"],
)


def normalised(shape, outputs):
    """A small network with batch normalisation, as a site's owner might have installed it."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, outputs),
    )


@pytest.fixture
def install(monkeypatch):
    """Make ``normalised`` an installed model."""
    load = plugins.load

    def with_ours(group, name, *, key=""):
        ours = (group, name) == ("models", "normalised")
        return normalised if ours else load(group, name, key=key)

    monkeypatch.setattr(plugins, "load", with_ours)


def images(count, mean):
    draws = np.random.Generator(np.random.PCG64(3))
    inputs = draws.normal(mean, 1, (count, 1, 4, 4)).astype(np.float32)
    return Dataset(inputs, draws.integers(0, 2, count))


@pytest.mark.usefixtures("install")
def test_local_tensors_stay_at_their_site_and_survive_the_rounds(build):
    kit = build_kit(IMAGES, SEED)
    far, near = (
        build(IMAGES, kit=kit, name=name, rows=images(24, mean), held_out=images(8, mean))
        for name, mean in (("far", 50.0), ("near", 0.0))
    )
    for number in (1, 2):
        for site in (far, near):
            reply = site.answer(ask(IMAGES, round_number=number))
            assert reply.update.vectors[DELTA].shape == (kit.layout.size,)
            assert kit.layout.size == 36 + 4 + 8 + 32 + 2
    # Each has its own statistics, counted over both rounds of three steps.
    statistics = [site._local for site in (far, near)]
    assert [int(local["1.num_batches_tracked"]) for local in statistics] == [6, 6]
    assert {local["1.num_batches_tracked"].dtype for local in statistics} == {np.dtype(np.int64)}
    means = [np.abs(local["1.running_mean"]).max() for local in statistics]
    assert means[0] > 10 * means[1]
    # A site's evaluation uses its own, whoever was asked before it.
    asked = ask(IMAGES, round_number=3, train=False, evaluate=True)
    counts = far.answer(asked).counts
    near.answer(asked)
    assert np.array_equal(far.answer(asked).counts, counts)


@pytest.mark.usefixtures("install")
def test_a_round_that_failed_leaves_a_site_s_own_tensors_as_they_were(build):
    class Once(PlainSite):
        fails = True

        def update(self, memory, delta, steps, learning_rate):
            if self.fails:
                raise ValueError
            return super().update(memory, delta, steps, learning_rate)

    site = build(IMAGES, Once(), rows=images(24, 0.0), held_out=images(8, 0.0))
    refusal(site.answer(ask(IMAGES)))
    assert site._local["1.num_batches_tracked"] == 0
    Once.fails = False
    site.answer(ask(IMAGES, round_number=2))
    assert site._local["1.num_batches_tracked"] == 3


@pytest.mark.usefixtures("install")
def test_batch_normalisation_is_refused_with_dp(build, tmp_path):
    with pytest.raises(TaskError, match="LF3302"):
        build(IMAGES, privacy=DP, rows=images(24, 0.0), held_out=images(8, 0.0))
    assert not (tmp_path / "north").exists()


def test_augmentation_and_preprocessing_of_the_task_are_used(build):
    task = replace(
        IMAGES,
        model=ModelSpec("linear"),
        preprocessing=[Step("scale", {"by": 2.0})],
        augmentation=[Step("flip", {"probability": 1.0})],
    )
    rows = images(24, 0.0)
    halved_and_flipped = Dataset(rows.inputs[..., ::-1] / np.float32(2), rows.targets)
    plain = replace(task, preprocessing=[], augmentation=[])
    ours = build(task, rows=rows, held_out=rows).answer(ask(task)).update
    by_hand = build(plain, rows=halved_and_flipped, held_out=rows).answer(ask(plain)).update
    np.testing.assert_allclose(ours.vectors[DELTA], by_hand.vectors[DELTA], rtol=1e-5, atol=1e-7)


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import torch
from lepton_fed.clients import site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Budget, ClientPrivacy, Privacy, RecordPrivacy, StrategyConf
from lepton_fed.core.exchange import Ask
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.data.dataset import Dataset
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.kit import build_kit

site.check_trainable = lambda *given: None  # takes three seconds to import
site.train = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
task = Task(
    data=DataContract(columns=[Column("a")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
    training=TrainingSpec(batch_size=8),
)
kit = build_kit(task, 1)
rows = Dataset(np.zeros((40, 1), np.float32), np.zeros(40, np.int64))
privacy = Privacy(RecordPrivacy(enabled=True, epsilon=3.0))
agreement = Agreement("run", task, StrategyConf(), 2, 1, privacy)
one = site.Site(
    "north", kit, PlainSite(), rows, rows, agreement,
    devices=[torch.device("cpu")], folder=Path(sys.argv[1]),
)
print(rows.digest, one.noise_multiplier, flush=True)
asked = Ask(agreement.digest, kit.layout.digest, 1, True, False, {"model": kit.initial})
one.answer(asked)
"""


def test_a_site_killed_between_charge_and_training_has_spent_the_round(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    digest, noise = done.stdout.split()
    ledger = Ledger(
        tmp_path / "ledger.sqlite", dataset="rows", content=digest, epsilon=3.0, delta=1e-5
    )
    assert ledger.spent == epsilon_of([SampledGaussian(float(noise), 0.2, 5)], 1e-5) > 0


def test_an_update_is_nothing_but_floats_a_weight_and_a_digest(build):
    reply = build(privacy=DP).answer(ask(evaluate=True, privacy=DP))
    assert {field.name for field in fields(Update)} == {"layout", "vectors", "weight", "norms"}
    assert {vector.dtype for vector in reply.update.vectors.values()} == {np.dtype(np.float32)}
    assert all(math.isfinite(value) for value in reply.update.vectors[DELTA])


@dataclass(frozen=True)
class Sends(PlainSite):
    """Sends what it is told to."""

    told: tuple = ()

    def update(self, memory, delta, steps, learning_rate):
        return {name: vector.copy() for name, vector in self.told}, {"kept": delta}


def bounded(bound):
    return replace(TASK, aggregation=Aggregation(norm_bound=bound))


@pytest.mark.parametrize("bound", [1e-3, 0.37, 5.0, 1e12])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e30])
def test_each_vector_of_an_update_is_scaled_down_to_the_norm_bound_by_itself(build, bound, scale):
    draws = np.random.Generator(np.random.PCG64(7))
    sent = {
        name: (scale * factor * draws.normal(size=6)).astype(np.float32)
        for name, factor in ((DELTA, 1.0), ("control", 0.01))
    }
    task = bounded(bound)
    update = build(task, Sends(told=tuple(sent.items()))).answer(ask(task)).update
    for name, vector in sent.items():
        before = math.sqrt(math.fsum(float(x) ** 2 for x in vector))
        assert update.norms[name] == pytest.approx(before, rel=1e-12)
        found = update.vectors[name]
        assert found.dtype == np.float32
        if before <= bound:
            assert found.tobytes() == vector.tobytes(), "to the bit"
        else:
            after = math.sqrt(math.fsum(float(x) ** 2 for x in found))
            assert bound * (1 - 2e-6) < after <= bound
            np.testing.assert_allclose(found, vector * (bound / before), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_does_not_leave_and_changes_nothing(build, value):
    rule = Sends(told=((DELTA, np.zeros(6, np.float32)), ("c", np.array([value] * 6, np.float32))))
    site = build(rule=rule)
    assert refusal(site.answer(ask())).code == "LF5312"
    assert (site._state, site._newest_round) == ({}, 0)


def in_run(run, privacy=DP):
    return replace(agreed(privacy=privacy), run=run)


def test_a_run_that_does_not_fit_into_the_rest_of_the_budget_is_refused_before_its_first_round(
    build, tmp_path
):
    budget = Budget(epsilon=4.0)  # one run of epsilon 3 and a little more
    first = build(privacy=DP, agreement=in_run("one"), budget=budget)
    for number in (1, 2, 3):
        asked = ask(round_number=number, privacy=DP, agreement=in_run("one").digest)
        assert first.answer(asked).update is not None
    first.close()
    before = entries_in(tmp_path / "north")
    with pytest.raises(BudgetExceeded) as caught:
        build(privacy=DP, agreement=in_run("two"), budget=budget)
    assert caught.value.code == "LF4207"
    assert entries_in(tmp_path / "north") == before
    build(privacy=DP, agreement=in_run("one"), budget=budget).close()  # it may go on
    smaller = replace(DP, record=replace(DP.record, epsilon=0.2))
    third = build(
        privacy=smaller,
        agreement=in_run("three", smaller),
        budget=budget,
        rows=dataset(39, seed=9),  # another seed of the run splits other rows off
    )
    assert third.epsilon == 0, "what other runs cost is not said"
    third.close()
    with pytest.raises(BudgetExceeded):
        build(privacy=DP, agreement=in_run("four"), budget=budget, content="e" * 64)
    build(
        privacy=DP, agreement=in_run("four"), budget=budget, content="e" * 64, named="other"
    ).close()


def test_two_runs_of_two_coordinators_cannot_each_fit_alone_and_overspend_together(build):
    budget = Budget(epsilon=4.0)
    build(privacy=DP, agreement=in_run("one"), budget=budget, coordinator="a")
    with pytest.raises(BudgetExceeded) as caught:
        build(privacy=DP, agreement=in_run("two"), budget=budget, coordinator="b")
    assert caught.value.code == "LF4207"
    site = build(privacy=DP, agreement=in_run("three"), budget=budget, coordinator="a")
    asked = ask(privacy=DP, agreement=in_run("three").digest)
    assert site.answer(asked).update is not None, "its own run before is over"


def test_a_run_costs_what_was_agreed_to_however_large_the_budget_is(build):
    budget, digest = Budget(epsilon=50.0), in_run("one").digest
    trained = []
    for _ in range(5):  # the same round again and again, after restarts
        site = build(privacy=DP, agreement=in_run("one"), budget=budget)
        reply = site.answer(ask(privacy=DP, agreement=digest))
        trained.append(reply.update is not None)
        assert reply.epsilon <= 3.0
        site.close()
    assert trained == [True, True, True, False, False]
    assert reply.refusal.code == "LF4508"
    other = build(privacy=DP, agreement=in_run("two"), budget=budget)
    reply = other.answer(ask(privacy=DP, agreement=in_run("two").digest))
    event = SampledGaussian(other.noise_multiplier, 8 / 40, 5)
    assert reply.epsilon == epsilon_of([event], 1e-5), "of this run alone"


def test_a_budget_without_epsilon_allows_no_training_with_dp(build):
    with pytest.raises(BudgetExceeded):
        build(privacy=DP, budget=Budget())
    assert build(budget=Budget()).answer(ask()).update is not None


CLIENT = Privacy(client=ClientPrivacy(enabled=True, epsilon=20.0, clip=0.01, noise="coordinator"))


def test_under_client_level_dp_an_update_is_clipped_and_counts_stay_unless_they_are_listed(build):
    for outside in ([], ["evaluation"]):
        privacy = replace(CLIENT, outside_epsilon=outside)
        agreement = with_client_noise(agreed(privacy=privacy), build_kit(TASK, SEED).layout.size)
        site = build(agreement=agreement, name=f"north-{len(outside)}")
        asked = replace(ask(evaluate=True), agreement=agreement.digest)
        reply = site.answer(asked)
        assert reply.refusal is None
        (vector,) = reply.update.vectors.values()
        assert 0.0099 < np.linalg.norm(vector) <= 0.01
        assert reply.update.norms[DELTA] > 0.01
        assert (reply.counts is not None) is bool(outside)
        assert reply.epsilon is None


MOVING = replace(CLIENT.client, quantile=0.5)
MASKED = SecureAggregation(enabled=True)


@pytest.mark.parametrize(
    ("client", "secure", "clips"),
    [
        (MOVING, MASKED, True),
        (replace(MOVING, noise="shared"), MASKED, True),
        # The coordinator that reads the update counts it, so it has to see how long it was.
        (MOVING, SecureAggregation(), False),
    ],
)
def test_an_update_is_clipped_to_the_norm_of_its_round(build, client, secure, clips):
    privacy = Privacy(client=client, secure_aggregation=secure)
    size = build_kit(TASK, SEED).layout.size
    agreement = with_client_noise(replace(agreed(privacy=privacy), cohort=5), size)
    site = build(agreement=agreement)
    asked = replace(ask(), agreement=agreement.digest)
    for told in (0.0, -0.01, 1e-300, 1e5, math.nan, math.inf):
        assert refusal(site.answer(replace(asked, clip=told))).code == "LF4519"
    for number, norm in enumerate((0.02, 0.005), 1):
        reply = site.answer(replace(asked, round_number=number, clip=norm))
        assert reply.refusal is None
        length = float(np.linalg.norm(reply.update.vectors[DELTA]))
        before = reply.update.norms[DELTA]
        assert before > norm
        assert length == pytest.approx(norm if clips else before, rel=1e-5)
        assert length <= norm or not clips
    again = site.answer(replace(asked, round_number=2, clip=0.005))
    assert again.refusal is None or again.refusal.code == "LF4506"
    assert refusal(site.answer(replace(asked, round_number=2, clip=0.006))).code == "LF4506"


def test_a_norm_where_none_moves_is_refused(build):
    site = build()
    for told in (0.01, math.nan):
        assert refusal(site.answer(ask(clip=told))).code == "LF4519"
        assert refusal(site.answer(ask(clip=told, train=False, evaluate=True))).code == "LF4519"


def test_a_site_checks_what_client_level_dp_costs_before_it_reads_a_ledger(build):
    agreement = with_client_noise(agreed(privacy=CLIENT), build_kit(TASK, SEED).layout.size)
    for lie in (0.0, 0.5 * agreement.client_noise):
        with pytest.raises(Refused) as refused:
            build(agreement=replace(agreement, client_noise=lie))
        assert refused.value.code == "LF4630"
    with pytest.raises(TaskError) as error:
        build(agreement=agreement, rule=PlainSite((DELTA, "control")))
    assert error.value.code == "LF3340"

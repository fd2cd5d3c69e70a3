"""Sites under a coordinator: strategies with state of their own, and budgets that run out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, Rounds, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.data.dataset import Dataset
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.rounds import Coordinator
from lepton_fed.strategies.base import DELTA, PlainSite, Strategy
from lepton_fed.strategies.fedavg import AddMean, fedavg
from lepton_fed.training.kit import build_kit

ROUNDS, SEED = 3, 5
TASK = Task(
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
    training=TrainingSpec(batch_size=8, learning_rate=0.2),
)
DP = Privacy(RecordPrivacy(enabled=True, epsilon=3.0, delta=1e-5, clip=0.5))


def dataset(count, seed=0):
    draws = np.random.Generator(np.random.PCG64(seed))
    inputs = draws.normal(size=(count, 2)).astype(np.float32)
    return Dataset(inputs, (inputs @ np.array([1.0, -2.0]) > 0).astype(np.int64))


def agreed(task=TASK, privacy=None):
    return Agreement("run", task, StrategyConf(), ROUNDS, SEED, privacy or Privacy())


def ask(round_number, vectors, privacy=None):
    layout = build_kit(TASK, SEED).layout.digest
    return Ask(agreed(TASK, privacy).digest, layout, round_number, True, False, vectors)


@pytest.fixture
def build(tmp_path):
    """Build sites that are closed at the end."""
    sites = []

    def one(task=TASK, rule=None, privacy=None, rows=None, name="north"):
        site = Site(
            name,
            build_kit(task, SEED),
            rule or PlainSite(),
            dataset(40) if rows is None else rows,
            dataset(10, seed=1),
            agreed(task, privacy),
            devices=[torch.device("cpu")],
            folder=tmp_path / name,
        )
        sites.append(site)
        return site

    yield one
    for site in sites:
        site.close()


CONTROL = "control"


@dataclass(frozen=True)
class Scaffold(PlainSite):
    """SCAFFOLD's site half: correct each gradient by c - c_i, and send how c_i changed."""

    vectors: tuple[str, ...] = (DELTA, CONTROL)

    def begin(self, start, received, state):
        general = received[CONTROL]
        own = state.get(CONTROL, np.zeros_like(general))
        correction = torch.from_numpy(general - own)
        sizes = [tensor.numel() for tensor in start.values()]
        parts = zip(start.items(), torch.split(correction, sizes), strict=True)
        return general, own, {name: part.view_as(tensor) for (name, tensor), part in parts}

    def gradient(self, memory, name, parameter, gradient):
        return gradient + memory[2][name]

    def update(self, memory, delta, steps, learning_rate):
        general, own, _ = memory
        after = own - general - delta / np.float32(steps * learning_rate)
        return {DELTA: delta, CONTROL: after - own}, {CONTROL: after}


@dataclass(frozen=True)
class ScaffoldServer(AddMean):
    """SCAFFOLD's server half: the model and c each move by their mean."""

    def init(self, model):
        return {CONTROL: np.zeros_like(model)}

    def sends(self, state):
        return state

    def step(self, state, model, aggregate):
        _, moved = super().step({}, model, aggregate)
        return {CONTROL: (state[CONTROL] + aggregate.mean[CONTROL]).astype(np.float32)}, moved


class Direct:
    """A transport without a network."""

    def __init__(self, sites):
        self._sites = {site.name: site for site in sites}

    def sites(self):
        return list(self._sites)

    def exchange(self, asks, deadline=None):
        for name, asked in asks.items():
            yield self._sites[name].answer(asked)

    def take_late(self):
        return []


def run(task, strategy, sites, folder, privacy=None):
    kit = build_kit(task, SEED)
    record = RunFolder.create(folder, "task", "")
    events = []
    log = EventLog(record.events, (events.append,))
    coordinator = Coordinator(
        agreed(task, privacy), Rounds(ROUNDS, evaluate=False), kit.layout, kit.plan, strategy,
        folder=record, log=log,
    )  # fmt: skip
    outcome = coordinator.run(Direct(sites), coordinator.start(kit.initial))
    log.close()
    return outcome, events


def scaffold_by_hand(task, parts):
    """SCAFFOLD on the whole of each site's rows, in double precision, as the paper writes it."""
    model = build_kit(task, SEED).model.double()
    parameters = list(model.parameters())

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    x = flat(parameters)
    general, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in parts]
    rate, steps = task.training.learning_rate, task.training.steps
    for _ in range(ROUNDS):
        moves, changes = [], []
        for index, part in enumerate(parts):
            y = x.clone()
            for _ in range(steps):
                nn.utils.vector_to_parameters(y, parameters)
                outputs = model(torch.from_numpy(part.inputs).double())
                loss = nn.functional.cross_entropy(outputs, torch.from_numpy(part.targets))
                gradient = flat(torch.autograd.grad(loss, parameters))
                y = y - rate * (gradient - own[index] + general)
            after = own[index] - general + (x - y) / (steps * rate)
            moves.append(y - x)
            changes.append(after - own[index])
            own[index] = after
        x = x + torch.stack(moves).mean(0)
        general = general + torch.stack(changes).mean(0)
    return x.numpy(), general.numpy()


def test_a_strategy_of_two_vectors_and_state_at_the_sites_runs_from_end_to_end(build, tmp_path):
    training = TrainingSpec(None, steps=4, batch_size=100, learning_rate=0.5)
    task = replace(TASK, training=training)
    parts = [dataset(40, 3), dataset(25, 4)]
    parts[1] = Dataset(parts[1].inputs + 2, parts[1].targets)  # sites that pull apart
    sites = [
        build(task, Scaffold(), rows=rows, name=name)
        for name, rows in zip(("north", "south"), parts, strict=True)
    ]
    strategy = Strategy("scaffold", Scaffold(), ScaffoldServer())
    outcome, _ = run(task, strategy, sites, tmp_path)
    model, general = scaffold_by_hand(task, parts)
    np.testing.assert_allclose(outcome.model, model, rtol=0, atol=1e-5)
    own = np.mean([site._state[CONTROL] for site in sites], axis=0)
    np.testing.assert_allclose(own, general, rtol=0, atol=1e-5)
    plain = [build(task, rows=rows, name=f"p{n}") for n, rows in enumerate(parts)]
    averaged, _ = run(task, fedavg(), plain, tmp_path)
    assert np.abs(averaged.model - model).max() > 1e-2, "the correction must matter"


def test_a_rule_s_state_is_kept_when_a_round_fails(build):
    site = build(rule=Scaffold())
    kit = build_kit(TASK, SEED)
    vectors = {MODEL: kit.initial, CONTROL: np.zeros_like(kit.initial)}
    assert site.answer(ask(1, vectors)).update is not None
    kept = site._state[CONTROL].copy()
    assert np.abs(kept).max() > 0
    # Without the control vector the rule fails.
    assert site.answer(ask(2, {MODEL: kit.initial})).refusal.code == "LF5301"
    assert np.array_equal(site._state[CONTROL], kept)


def test_a_site_that_has_spent_its_budget_costs_only_itself(build, tmp_path):
    earlier = build(privacy=DP, name="poor", rows=dataset(30, 2))
    earlier.answer(
        ask(1, {MODEL: build_kit(TASK, SEED).initial}, DP)
    )  # another run on this ledger: its last round is too many
    earlier.close()
    rich, poor = build(privacy=DP), build(privacy=DP, name="poor", rows=dataset(30, 2))
    outcome, events = run(TASK, fedavg(), [rich, poor], tmp_path, DP)
    assert {name: site.rounds for name, site in outcome.record.sites.items()} == {
        "north": 3,
        "poor": 2,
    }
    refused = [event for event in events if event["event"] == "reply.refused"]
    assert [(e["round"], e["site"], e["code"]) for e in refused] == [(3, "poor", "LF4201")]
    assert outcome.record.sites["poor"].epsilon <= 3.0

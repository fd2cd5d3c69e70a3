"""Whether a model can be trained with record-level DP is tried out, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.task import (
    DataContract,
    ModelSpec,
    Target,
    Task,
    TrainingSpec,
)
from lepton_fed.errors import TaskError
from lepton_fed.models.build import read_vector
from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import IndependentSteps
from lepton_fed.training.kit import build_kit
from lepton_fed.training.local import record_losses
from lepton_fed.training.noise import check_trainable

TASK = Task(
    data=DataContract("image", [1, 6, 6], target=Target(classes=["a", "b", "c"])),
    model=ModelSpec("cnn", {"channels": [8]}),
    training=TrainingSpec(epochs=2, batch_size=10),
)
RECORD = RecordPrivacy(enabled=True, epsilon=3.0, delta=1e-5)


def refusal(act, *given):
    with pytest.raises(TaskError) as caught:
        act(*given)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture
def kit():
    return build_kit(TASK, seed=1)


@pytest.mark.parametrize("mode", [True, False])
def test_a_sound_model_passes_and_is_left_as_it_was(kit, mode):
    kit.model.train(mode)
    before = read_vector(kit.model, kit.layout)
    draws = torch.get_rng_state()
    names = list(kit.model.state_dict())
    check_trainable(kit, RECORD, devices=1)
    assert kit.model.training is mode
    assert np.array_equal(read_vector(kit.model, kit.layout), before)
    assert torch.equal(torch.get_rng_state(), draws)
    assert list(kit.model.state_dict()) == names
    assert not any(module._forward_hooks for module in kit.model.modules())
    assert all(parameter.grad is None for parameter in kit.model.parameters())


class Forgetful(nn.Module):
    """Drops activations at random while it is trained."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(36, 3), nn.Dropout(0.5)

    def forward(self, images):
        return self.head(self.drop(images.flatten(1)))


class Tied(nn.Module):
    """Uses one layer twice, as a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(36, 36), nn.Linear(36, 3)

    def forward(self, images):
        return self.head(self.first(torch.tanh(self.first(images.flatten(1)))))


class Behind(Tied):
    """Uses a layer's weights behind the layer's back."""

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        return nn.functional.linear(hidden, self.head.weight, self.head.bias)


class HalfBehind(Tied):
    """Uses a layer, and its weights once more behind its back."""

    def forward(self, images):
        hidden = torch.tanh(self.first(images.flatten(1)))
        return self.head(nn.functional.linear(hidden, self.first.weight))


class Idle(Tied):
    """Runs a layer that the loss ignores."""

    def forward(self, images):
        self.first(images.flatten(1))
        return self.head(images.flatten(1))


class Normalised(nn.Module):
    """Normalises by the batch with a layer of its own making."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, images):
        rows = images.flatten(1)
        return self.head((rows - rows.mean(0)) / (rows.std(0, correction=0) + 1))


class InTraining(Normalised):
    """Mixes records in training only."""

    def forward(self, images):
        rows = images.flatten(1)
        return self.head(rows - rows.mean(0) if self.training else rows)


class Gated(Normalised):
    """Mixes records behind a gate that starts closed; a coordinator can open it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(36, 36)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, images):
        rows = images.flatten(1)
        return self.head(rows + self.gate(rows.mean(0, keepdim=True)))


class Paired(Normalised):
    """Takes records two at a time."""

    def forward(self, images):
        return self.head(images.flatten(1)).view(-1, 2, 3).flatten(0, 1)


def installed(monkeypatch, model):
    monkeypatch.setattr(plugins, "call", lambda *given, **named: model())
    return build_kit(TASK, seed=1)


def test_what_a_layer_draws_is_drawn_beside_the_global_generator(monkeypatch):
    kit = installed(monkeypatch, Forgetful)
    draws = torch.get_rng_state()
    check_trainable(kit, RECORD, devices=1)
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("model", [Tied, Idle, Forgetful])
def test_a_model_whose_layers_are_used_twice_idly_or_at_random_can_be_trained(monkeypatch, model):
    check_trainable(installed(monkeypatch, model), RECORD, devices=1)


@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("model", [Behind, HalfBehind])
def test_a_parameter_that_is_used_behind_its_layer_is_refused(monkeypatch, model, clip):
    kit = installed(monkeypatch, model)
    problem = refusal(check_trainable, kit, replace(RECORD, clip=clip), 1)
    assert (problem.code, problem.key) == ("LF3306", "task.model")
    assert not any(module._forward_hooks for module in kit.model.modules())


def test_what_an_idle_layer_leaves_does_not_pile_up(monkeypatch):
    model = installed(monkeypatch, Idle).model.train()
    inputs, targets = torch.randn(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64)
    with DpSgd(
        model,
        record_losses(TASK),
        clip=1.0,
        noise=IndependentSteps(0.0, Entropy(bytes(32))),
        expected_batch=4,
    ) as engine:
        for _ in range(3):
            engine.clipped_sum(inputs, targets)
            assert len(getattr(model.first, "activations", [])) <= 1


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Normalised, "depends on the others"),
        (InTraining, "depends on the others"),
        (Gated, "depends on the others"),
        (Paired, "record by record"),
    ],
)
def test_a_model_that_mixes_records_in_its_own_way_is_refused(monkeypatch, model, why):
    kit = installed(monkeypatch, model)
    kit.model.train()
    problem = refusal(check_trainable, kit, RECORD, 1)
    assert (problem.code, problem.key) == ("LF3302", "task.model")
    assert why in problem.what
    assert kit.model.training

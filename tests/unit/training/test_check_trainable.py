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
from lepton_fed.training.kit import build_kit
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


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_sound_model_passes_and_is_left_as_it_was(kit, engine, mode):
    kit.model.train(mode)
    before = read_vector(kit.model, kit.layout)
    draws = torch.get_rng_state()
    names = list(kit.model.state_dict())
    check_trainable(kit, replace(RECORD, engine=engine), devices=1)
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
    """Uses one layer twice, which ghost norms cannot add up."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(36, 36), nn.Linear(36, 3)

    def forward(self, images):
        return self.head(self.first(torch.tanh(self.first(images.flatten(1)))))


class Normalised(nn.Module):
    """Normalises by the batch with a layer of its own making."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, images):
        rows = images.flatten(1)
        return self.head((rows - rows.mean(0)) / (rows.std(0, correction=0) + 1))


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


def test_a_layer_that_an_engine_cannot_handle_is_refused_with_the_other_engine_named(monkeypatch):
    kit = installed(monkeypatch, Tied)
    check_trainable(kit, replace(RECORD, engine="hooks"), devices=1)
    problem = refusal(check_trainable, kit, replace(RECORD, engine="ghost"), 1)
    assert (problem.code, problem.key) == ("LF3306", "privacy.record.engine")
    assert "the other engine (hooks or ghost)" in problem.remedy
    assert not any(module._forward_hooks for module in kit.model.modules())
    check_trainable(kit, replace(RECORD, engine="hooks"), devices=1)


@pytest.mark.parametrize(
    ("model", "why"), [(Normalised, "depends on the others"), (Paired, "one record by itself")]
)
def test_a_model_that_mixes_records_in_its_own_way_is_refused(monkeypatch, model, why):
    kit = installed(monkeypatch, model)
    kit.model.train()
    problem = refusal(check_trainable, kit, RECORD, 1)
    assert (problem.code, problem.key) == ("LF3302", "task.model")
    assert why in problem.what
    assert kit.model.training

"""A model that no machine can hold is refused before its memory is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.core.task import DataContract, ModelSpec, Target, Task
from lepton_fed.errors import TaskError
from lepton_fed.models import build
from lepton_fed.models.build import build_model

TASK = Task(data=DataContract(target=Target(classes=["a", "b"])), model=ModelSpec("mlp"))
IMAGE = (1, 8, 8)


@pytest.fixture
def installed(monkeypatch):
    """Make a function the model, and tell on which devices it was called."""

    def install(construct):
        devices = []

        def call(*_given, **_named):
            devices.append(torch.empty(0).device.type)
            return construct()

        monkeypatch.setattr(plugins, "call", call)
        return devices

    return install


def refused(task=TASK):
    with pytest.raises(TaskError) as caught:
        build_model(task, IMAGE, seed=0)
    (problem,) = caught.value.problems
    assert problem.key == "task.model.arguments"
    return problem


def test_a_model_beyond_the_limit_is_refused_by_its_size():
    problem = refused(replace(TASK, model=ModelSpec("mlp", {"hidden": [100_000_000, 100_000]})))
    assert problem.code == "LF3003"
    assert "10,006,500,300,002 trainable parameters; the limit is 500,000,000" in problem.what
    assert "LoRA" in problem.remedy


def test_nothing_is_allocated_for_a_model_beyond_the_limit(installed):
    devices = installed(lambda: nn.Linear(1_000_000, 1_000))
    assert refused().code == "LF3003"
    assert devices == ["meta"]


@pytest.mark.parametrize("width", [2**40, 2**70])
def test_nothing_is_allocated_for_a_size_that_cannot_be_counted(installed, width):
    devices = installed(lambda: nn.Linear(width, width))
    problem = refused()
    assert problem.code == "LF3001"
    assert problem.what == "a tensor of the model has more bytes than can be counted"
    assert devices == ["meta"]


def test_frozen_parameters_do_not_count(installed, monkeypatch):
    monkeypatch.setattr(build, "_LARGEST", 20)
    installed(lambda: nn.Sequential(nn.Linear(100, 4), nn.Linear(4, 4)))
    assert refused().code == "LF3003"
    task = replace(TASK, model=ModelSpec("mlp", frozen=["0.*"]))
    assert isinstance(build_model(task, IMAGE, seed=0), nn.Module)


def test_a_model_that_needs_values_to_be_built_is_built_all_the_same(installed):
    def construct():
        return nn.Linear(int(torch.ones(3).sum().item()), 2)

    devices = installed(construct)
    assert build_model(TASK, IMAGE, seed=0).in_features == 3
    assert devices == ["meta", "cpu"]


def test_such_a_model_is_held_to_the_limit_too(installed, monkeypatch):
    monkeypatch.setattr(build, "_LARGEST", 7)
    installed(lambda: nn.Linear(int(torch.ones(3).sum().item()), 2))
    assert refused().code == "LF3003"


def test_a_model_that_loads_weights_is_built_in_silence(installed):
    weights = nn.Linear(2, 2).state_dict()

    def construct():
        model = nn.Linear(2, 2)
        model.load_state_dict(weights)
        return model

    installed(construct)
    assert torch.equal(build_model(TASK, IMAGE, seed=0).weight, weights["weight"])


def test_what_the_first_build_draws_does_not_change_the_weights(installed):
    def construct():
        torch.rand(5, device="cpu")
        return nn.Linear(2, 2)

    installed(construct)
    weight = build_model(TASK, IMAGE, seed=3).weight
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        assert torch.equal(weight, construct().weight)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ValueError("3 groups do not divide 8 channels"), "3 groups do not divide 8 channels"),
        (RuntimeError("mat1 and mat2 do not fit\ntrace\ntrace"), "mat1 and mat2 do not fit"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 2560000000000 bytes."
            ),
            "can't allocate memory: you tried to allocate 2560000000000 bytes.",
        ),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_a_constructor_raises_is_shown_at_its_arguments(installed, error, what):
    def construct():
        raise error

    installed(construct)
    problem = refused()
    assert (problem.code, problem.what) == ("LF3001", what)

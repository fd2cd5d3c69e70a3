"""The built-in models: their shapes, what they refuse, and that the seed alone decides a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.core.task import DataContract, ModelSpec, Target, Task
from lepton_fed.errors import ConfError, TaskError
from lepton_fed.models.build import build_model

IMAGE, ROW = (3, 8, 9), (5,)


def task(name="mlp", classes=4, **arguments):
    target = Target(classes=[str(n) for n in range(classes)]) if classes else Target("number", "y")
    return Task(data=DataContract(target=target), model=ModelSpec(name, arguments))


def refusal(kind, of, shape=ROW):
    with pytest.raises(kind) as caught:
        build_model(of, shape, seed=0)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "parameters"),
    [
        ("linear", ROW, {}, 5 * 4 + 4),
        ("linear", IMAGE, {}, 216 * 4 + 4),
        ("mlp", ROW, {}, 5 * 64 + 64 + 64 * 4 + 4),
        ("mlp", ROW, {"hidden": []}, 5 * 4 + 4),
        ("mlp", ROW, {"hidden": [7, 2], "activation": "tanh"}, 5 * 7 + 7 + 7 * 2 + 2 + 2 * 4 + 4),
        ("mlp", IMAGE, {"hidden": [3], "activation": "gelu"}, 216 * 3 + 3 + 3 * 4 + 4),
        ("cnn", IMAGE, {"channels": [4]}, 3 * 9 * 4 + 4 + 8 + 4 * 4 * 4 * 4 + 4),
        # The second width loses its odd column: 9 halves to 4, then to 2.
        (
            "cnn",
            IMAGE,
            {"channels": [4, 6], "groups": 2, "hidden": 5},
            (3 * 9 * 4 + 4 + 8) + (4 * 9 * 6 + 6 + 12) + (6 * 2 * 2 * 5 + 5) + (5 * 4 + 4),
        ),
    ],
)
def test_a_model_has_the_size_its_arguments_say(name, shape, arguments, parameters):
    model = build_model(task(name, **arguments), shape, seed=3)
    assert sum(p.numel() for p in model.parameters()) == parameters
    for batch in (1, 6):
        outputs = model(torch.zeros(batch, *shape))
        assert outputs.shape == (batch, 4)
        assert outputs.dtype == torch.float32


def test_a_regression_has_one_output():
    assert build_model(task("linear", classes=0), ROW, seed=0)(torch.zeros(3, 5)).shape == (3, 1)


def test_the_first_cnn_example_does_not_change_the_second():
    model = build_model(task("cnn"), IMAGE, seed=1)
    both = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    other = both.clone()
    other[0] += 1
    assert torch.equal(model(both)[1], model(other)[1])


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "word"),
    [
        ("mlp", ROW, {"hidden": [8, 0]}, "[8, 0]"),
        ("cnn", ROW, {}, "(5,)"),
        ("cnn", (1, 3, 3), {}, "3x3"),
        ("cnn", (1, 1, 9), {"channels": [8]}, "1x9"),
        ("cnn", IMAGE, {"channels": [10], "groups": 4}, "10 channels"),
        ("cnn", IMAGE, {"channels": []}, "channels"),
        ("cnn", IMAGE, {"channels": [8, -1]}, "channels"),
        ("cnn", IMAGE, {"hidden": -1}, "hidden"),
        ("cnn", IMAGE, {"groups": 0}, "groups"),
    ],
)
def test_arguments_that_make_no_model_are_refused_by_key(name, shape, arguments, word):
    problem = refusal(TaskError, task(name, **arguments), shape)
    assert (problem.code, problem.key) == ("LF3001", "task.model.arguments")
    assert word in problem.what


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        ({"hiden": [8]}, "LF1023", "task.model.arguments.hiden"),
        ({"hidden": "wide"}, "LF1025", "task.model.arguments.hidden"),
        ({"activation": "sigmoid"}, "LF1025", "task.model.arguments.activation"),
        ({"outputs": 3}, "LF1026", "task.model.arguments.outputs"),
    ],
)
def test_arguments_that_no_model_has_are_refused_by_key(arguments, code, key):
    problem = refusal(ConfError, task("mlp", **arguments))
    assert (problem.code, problem.key) == (code, key)


def test_a_model_that_is_not_installed_is_refused():
    assert refusal(ConfError, task("resnet")).code == "LF1021"


def test_a_plug_in_that_returns_no_module_is_refused(monkeypatch):
    monkeypatch.setattr(plugins, "call", lambda *given, **named: "a model")
    problem = refusal(TaskError, task())
    assert (problem.code, problem.key) == ("LF3002", "task.model.name")


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        return nn.utils.parameters_to_vector(build_model(task("cnn"), IMAGE, seed).parameters())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = weights(5)
        torch.manual_seed(2)
        assert torch.equal(first, weights(5))
        assert not torch.equal(first, weights(6))


def test_torch_s_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    build_model(task("cnn"), IMAGE, seed=5)
    refusal(TaskError, task("mlp", hidden=[0]))
    assert torch.equal(torch.get_rng_state(), before)

"""Between a model and its flat vector: which tensors travel, and that none changes on the way."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.core.layout import Layout
from lepton_fed.core.task import DataContract, ModelSpec, Target, Task
from lepton_fed.errors import TaskError
from lepton_fed.models.build import (
    build_model,
    layout_of,
    local_tensors,
    read_vector,
    write_local,
    write_vector,
)

TASK = Task(data=DataContract(target=Target(classes=["a", "b"])), model=ModelSpec("mlp"))
IMAGE = (2, 6, 6)


class Normalised(nn.Module):
    """A convolution with BatchNorm, a buffer that is not saved, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, images):
        return self.head(self.norm(self.body(images)).mean(dim=(2, 3)))


def built(monkeypatch, model=None, **spec):
    """Build with TASK's rules a given module, as if it were an installed plug-in."""
    if model is not None:
        monkeypatch.setattr(plugins, "call", lambda *given, **named: model)
    task = replace(TASK, model=ModelSpec("mlp", **spec))
    module = build_model(task, IMAGE, seed=0)
    return module, layout_of(module, task.model)


def rules(layout):
    return {entry.name: entry.rule for entry in layout.entries}


def ramp(layout: Layout):
    return np.arange(layout.size, dtype=np.float32)


def test_patterns_make_tensors_frozen_or_local(monkeypatch):
    model, layout = built(monkeypatch, frozen=["1.*"], local=["3.bias"])
    assert rules(layout) == {
        "1.weight": "frozen",
        "1.bias": "frozen",
        "3.weight": "shared",
        "3.bias": "local",
    }
    assert layout.size == 64 * 2
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "1.weight",
        "1.bias",
    }


def test_a_frozen_tensor_is_in_the_digest_by_its_content(monkeypatch):
    model, layout = built(monkeypatch, frozen=["1.bias"])
    with torch.no_grad():
        model[3].bias += 1
    assert layout_of(model, ModelSpec(frozen=["1.bias"])).digest == layout.digest
    with torch.no_grad():
        model[1].bias[0] += 1e-6
    assert layout_of(model, ModelSpec(frozen=["1.bias"])).digest != layout.digest


@pytest.mark.parametrize("kind", ["frozen", "local"])
def test_a_pattern_that_matches_nothing_is_refused_by_key(monkeypatch, kind):
    with pytest.raises(TaskError) as caught:
        built(monkeypatch, **{kind: ["1.weight", "encoder.*"]})
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF3004", f"task.model.{kind}[1]")
    assert "'encoder.*'" in problem.what
    assert "3.weight" in problem.remedy


@pytest.mark.parametrize("kind", ["frozen", "local"])
def test_a_model_that_shares_nothing_is_refused(monkeypatch, kind):
    with pytest.raises(TaskError) as caught:
        built(monkeypatch, **{kind: ["*"]})
    assert caught.value.code == "LF3006"


def test_a_shared_tensor_of_another_type_is_refused(monkeypatch):
    with pytest.raises(TaskError, match=r"'1\.weight' is float64") as caught:
        built(monkeypatch, nn.Sequential(nn.Flatten(), nn.Linear(72, 2, dtype=torch.float64)))
    assert caught.value.code == "LF3005"


def test_running_statistics_stay_local_with_their_own_type(monkeypatch):
    _, layout = built(monkeypatch, Normalised())
    local = {entry.name: entry.dtype for entry in layout.of_rule("local")}
    assert local == {
        "norm.running_mean": "float32",
        "norm.running_var": "float32",
        "norm.num_batches_tracked": "int64",
    }
    assert "scratch" not in rules(layout)
    assert layout.size == 2 * 4 * 9 + 4 + 4 + 4 + 4 * 2 + 2


class Table(nn.Module):
    """A buffer that is no running statistic."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(72, 2)
        self.register_buffer("codes", torch.arange(3))
        self.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, images):
        return self.head(images.flatten(1))


def test_other_buffers_are_the_same_everywhere_by_their_content(monkeypatch):
    model, layout = built(monkeypatch, Table())
    kinds = {entry.name: (entry.rule, entry.dtype) for entry in layout.entries}
    assert kinds["codes"] == ("frozen", "int64")
    assert kinds["scale"] == ("frozen", "bfloat16")
    model.codes[1] = 7
    assert layout_of(model, ModelSpec()).digest != layout.digest


def test_a_pattern_makes_a_buffer_local(monkeypatch):
    model, layout = built(monkeypatch, Table(), local=["codes"])
    assert rules(layout)["codes"] == "local"
    write_local(model, {"codes": np.array([5, 6, 7])})
    assert local_tensors(model, layout)["codes"].tolist() == [5, 6, 7]


class Adapted(nn.Module):
    """A frozen base in half precision and a head."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.arange(6).reshape(2, 3).bfloat16(), requires_grad=False)
        self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16), requires_grad=False)
        self.head = nn.Linear(3, 2)


def test_a_frozen_tensor_may_be_of_a_type_that_numpy_lacks(monkeypatch):
    model, layout = built(monkeypatch, Adapted())
    frozen = {entry.name: (entry.dtype, entry.shape) for entry in layout.of_rule("frozen")}
    assert frozen["base"] == ("bfloat16", (2, 3))
    assert frozen["gain"] == ("bfloat16", ())
    content = model.base.view(torch.uint8).numpy().tobytes()
    (base,) = (entry for entry in layout.entries if entry.name == "base")
    assert base.content == hashlib.sha256(content).hexdigest()
    model.base.view(torch.int16)[1, 2] ^= 1
    assert layout_of(model, ModelSpec()).digest != layout.digest


def test_only_shared_tensors_are_read(monkeypatch):
    model, layout = built(monkeypatch, Adapted())
    # The base cannot become a numpy array: whoever touches it meets a TypeError.
    write_vector(model, layout, ramp(layout))
    assert read_vector(model, layout).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({"local": ["base"]}, "'base' is bfloat16; no site can keep that"),
        ({}, "'base' is bfloat16; shared tensors are float32"),
    ],
)
def test_no_other_tensor_may_be_of_such_a_type(monkeypatch, spec, what):
    model = Adapted()
    model.base.requires_grad_(not spec)
    with pytest.raises(TaskError, match=what) as caught:
        built(monkeypatch, model, **spec)
    assert caught.value.code == "LF3005"


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_the_running_statistics_of_a_whole_model_are_found(monkeypatch, layer):
    model, _ = built(monkeypatch, nn.Sequential(layer, nn.Linear(3, 2)))
    statistics = {name for name, rule in rules(layout_of(model, ModelSpec())).items()
                  if rule == "local"}  # fmt: skip
    assert statistics == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert set(rules(layout_of(nn.BatchNorm1d(3), ModelSpec())).values()) == {"shared", "local"}


def test_local_tensors_come_back_as_they_were(monkeypatch):
    model, layout = built(monkeypatch, Normalised())
    model.train()
    model(torch.randn(5, *IMAGE, generator=torch.Generator().manual_seed(0)))
    kept = local_tensors(model, layout)
    assert kept["norm.num_batches_tracked"].dtype == np.int64
    assert kept["norm.num_batches_tracked"] == 1
    model(torch.ones(5, *IMAGE))
    assert kept["norm.num_batches_tracked"] == 1, "a copy, not a view"
    write_local(model, kept)
    assert model.norm.num_batches_tracked.dtype == torch.int64
    for name, value in local_tensors(model, layout).items():
        assert np.array_equal(value, kept[name]), name


def test_shared_weights_do_not_touch_local_tensors(monkeypatch):
    model, layout = built(monkeypatch, Normalised())
    before = local_tensors(model, layout)
    write_vector(model, layout, ramp(layout))
    after = local_tensors(model, layout)
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_vector_comes_back_as_it_was_written(monkeypatch, memory_format):
    model, layout = built(monkeypatch, Normalised())
    model.to(memory_format=memory_format)
    vector = ramp(layout)
    vector.flags.writeable = False  # as it comes off the wire
    write_vector(model, layout, vector)
    read = read_vector(model, layout)
    assert read.tobytes() == vector.tobytes()
    assert model.body.weight.is_contiguous(memory_format=memory_format)
    assert model.body.weight[1, 0, 0, 2].item() == 18 + 2, "row-major order, whatever the strides"
    read[:] = -1
    assert read_vector(model, layout).tobytes() == vector.tobytes(), "a copy, not a view"


def test_the_values_of_a_vector_are_copied_into_the_model(monkeypatch):
    model, layout = built(monkeypatch)
    vector = ramp(layout)
    write_vector(model, layout, vector)
    vector[:] = 0
    assert read_vector(model, layout)[-1] == layout.size - 1


def test_bits_survive_the_round_trip(monkeypatch):
    model, layout = built(monkeypatch)
    bits = np.random.Generator(np.random.PCG64(1)).integers(0, 2**32, layout.size, dtype=np.uint32)
    write_vector(model, layout, bits.view(np.float32))
    assert np.array_equal(read_vector(model, layout).view(np.uint32), bits)


def test_writing_does_not_disturb_a_gradient_that_is_needed_later(monkeypatch):
    model, layout = built(monkeypatch)
    write_vector(model, layout, ramp(layout))
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(torch.ones(1, *IMAGE)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("length", [-1, 1])
def test_a_vector_of_another_length_is_refused(monkeypatch, length):
    model, layout = built(monkeypatch)
    with pytest.raises(ValueError, match="shape"):
        write_vector(model, layout, np.zeros(layout.size + length, np.float32))

"""Where a site trains: the words of a conf, and on GPUs the same result as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lepton_fed.clients import site as site_module
from lepton_fed.core.task import DataContract, ModelSpec, Numeric, Target, Task, TrainingSpec
from lepton_fed.errors import ConfError
from lepton_fed.models.build import build_model, layout_of, read_vector
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.simulations.sequential import simulate
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.device import devices_of, model_on
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def gpus(count):
    there = torch.cuda.device_count()
    return pytest.mark.skipif(there < count, reason=f"needs {count} GPUs, there are {there}")


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        ("cpu", ["cpu"]),
        ("cuda", ["cuda:0"]),
        ("cuda:0", ["cuda:0"]),
        ("cuda:3", ["cuda:3"]),
        ("cuda:2,0", ["cuda:2", "cuda:0"]),
    ],
)
def test_words_name_devices(monkeypatch, words, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_of(words) == [torch.device(name) for name in devices]


@pytest.mark.parametrize(
    "words",
    ["", "CPU", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:a", "cuda:0,", "cuda:,1", "cuda:0 ,1"],
)
def test_other_words_are_refused(monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfError) as caught:
        devices_of(words)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1101", "device")


@pytest.mark.parametrize(
    ("words", "there", "missing"), [("cuda", 0, 0), ("cuda:1", 1, 1), ("cuda:0,5", 4, 5)]
)
def test_a_gpu_that_is_not_there_is_named(monkeypatch, words, there, missing):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ConfError) as caught:
        devices_of(words)
    (problem,) = caught.value.problems
    assert problem.code == "LF1102"
    assert f"wants GPU {missing}; torch sees {there}" in problem.what
    assert "device: cpu" in problem.remedy


def test_a_cpu_is_there_without_any_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices_of("cpu") == [CPU]


def test_on_one_device_a_model_is_called_as_it_is():
    model = nn.Linear(2, 2)
    assert model_on(model, [CPU], Numeric()) is model


def test_sites_take_the_gpus_in_turn(load, monkeypatch):
    """The devices are counterfeit here; training is on the CPU."""
    chosen = {}
    init = site_module.Site.__init__

    def looking(self, name, *given, devices, **named):
        chosen[name] = devices
        init(self, name, *given, devices=[CPU], **named)

    monkeypatch.setattr(site_module.Site, "__init__", looking)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    simulate(load("device=cuda:0,1", "sites.count=3", "rounds.count=1"))
    assert chosen == {
        "site-1": [torch.device("cuda", 0)],
        "site-2": [torch.device("cuda", 1)],
        "site-3": [torch.device("cuda", 0)],
    }


def task(model="mlp", **numeric):
    return Task(
        data=DataContract("image", list(SHAPE), target=Target(classes=["a", "b", "c"])),
        model=ModelSpec(model),
        training=TrainingSpec(batch_size=16, learning_rate=0.1, momentum=0.5),
        numeric=Numeric(**numeric),
    )


def trained(of, devices, private=None):
    draws = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, *SHAPE, generator=draws).to(devices[0])
    targets = torch.randint(3, (50,), generator=draws).to(devices[0])
    model = build_model(of, SHAPE, seed=3).to(devices[0])
    layout = layout_of(model, of.model)
    moment = Moment(seed=1, round_number=1, rounds=2, site="north")
    train(
        model, layout, LocalRows(inputs, targets), of, PlainSite(), None, moment,
        devices=devices, private=private,
    )  # fmt: skip
    return read_vector(model, layout)


@pytest.mark.gpu
@gpus(1)
@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_gpu_trains_what_the_cpu_trains_and_repeats_itself(model, memory_format):
    of = task(model, memory_format=memory_format)
    gpu = devices_of("cuda")
    found = trained(of, gpu)
    np.testing.assert_allclose(found, trained(of, [CPU]), rtol=0, atol=2e-3)
    assert found.tobytes() == trained(of, gpu).tobytes()


@pytest.mark.gpu
@gpus(1)
def test_bf16_on_a_gpu_is_near_float32():
    gpu = devices_of("cuda")
    half = trained(task("cnn", precision="bf16"), gpu)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, trained(task("cnn"), gpu), rtol=0, atol=0.05)


@pytest.mark.gpu
@gpus(1)
def test_a_gpu_trains_privately_what_the_cpu_trains():
    size = task("cnn").training.batch_size

    def run(devices):
        private = PrivateTraining(1.0, 0.8, Entropy(bytes(32)), PoissonSampler(50, size))
        return trained(task("cnn"), devices, private)

    np.testing.assert_allclose(run(devices_of("cuda")), run([CPU]), rtol=0, atol=2e-3)


@pytest.mark.gpu
@gpus(1)
def test_a_simulation_on_a_gpu_learns(load, private):
    done = simulate(load("device=cuda", metrics=["accuracy"]))
    assert done.summary.metrics["accuracy"] > 0.7
    assert not done.summary.repeatable
    assert simulate(load("device=cuda", *private)).summary.sites[0].epsilon <= 4


@pytest.mark.gpu
@gpus(1)
def test_training_on_a_gpu_leaves_its_generator():
    before = torch.cuda.get_rng_state(0)
    trained(task("cnn"), devices_of("cuda"))
    assert torch.equal(torch.cuda.get_rng_state(0), before)


@pytest.mark.gpu
@gpus(2)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_gpus_share_each_batch_and_train_what_one_trains(precision):
    of = task("cnn", precision=precision)
    seen = set()

    class Where(nn.Module):
        def forward(self, batch):
            seen.add((batch.device.index, len(batch)))
            return batch

    model = nn.Sequential(Where(), nn.Flatten(), nn.Linear(64, 3)).to("cuda:0")
    split = model_on(model, devices_of("cuda:0,1"), of.numeric)
    outputs = split(torch.ones(16, *SHAPE, device="cuda:0"))
    assert seen == {(0, 8), (1, 8)}
    assert outputs.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    tolerance = 2e-3 if precision == "float32" else 0.05
    two, one = trained(of, devices_of("cuda:0,1")), trained(of, devices_of("cuda:0"))
    np.testing.assert_allclose(two, one, rtol=0, atol=tolerance)


@pytest.mark.gpu
@gpus(2)
def test_sites_on_two_gpus_train_as_on_one(load):
    two, one = simulate(load("device=cuda:0,1")), simulate(load("device=cuda:0"))
    np.testing.assert_allclose(two.outcome.model, one.outcome.model, rtol=0, atol=2e-3)

"""DP-SGD against one record at a time: what is clipped, summed, noised and divided, and by what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lepton_fed.core.task import DataContract, ModelSpec, Step, Target, Task, TrainingSpec
from lepton_fed.data.augmentation import build_augmentation
from lepton_fed.errors import TaskError
from lepton_fed.models.build import build_model, layout_of, read_vector
from lepton_fed.privacy.dp.engine import DpSgd, check_model
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.privacy.dp.step_noise import IndependentSteps, add_noise
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training import local
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, record_losses, train

CPU = torch.device("cpu")
KEY = bytes(range(32))


def task(model="mlp", shape=(1, 6, 6), classes=3, frozen=(), arguments=None, **training):
    target = Target(classes=[str(n) for n in range(classes)]) if classes else Target("number", "y")
    return Task(
        data=DataContract("image", list(shape), target=target),
        model=ModelSpec(model, arguments or {}, frozen=list(frozen)),
        training=TrainingSpec(**{"batch_size": 8, "learning_rate": 0.1, **training}),
    )


def rows(of, count, scale=3.0):
    draws = torch.Generator().manual_seed(count)
    inputs = scale * torch.randn(count, *of.data.shape, generator=draws)
    if of.data.target.kind == "number":
        return LocalRows(inputs, torch.randn(count, generator=draws))
    return LocalRows(inputs, torch.randint(of.outputs, (count,), generator=draws))


def engine(model, of, clip=1.0, noise=0.0, expected=8, entropy=None, loss=None):
    return DpSgd(
        model,
        loss or record_losses(of),
        clip=clip,
        noise=IndependentSteps(noise * clip, entropy or Entropy(KEY)),
        expected_batch=expected,
    )


def one_by_one(model, of, data, clip):
    """Clip and add each record's gradient, from a pass of its own; return the norms too."""
    losses = record_losses(of)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    norms = []
    for index in range(len(data)):
        loss = losses(model(data.inputs[index : index + 1]), data.targets[index : index + 1])
        found = [g.double() for g in torch.autograd.grad(loss.sum(), parameters)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in found))
        norms.append(norm)
        for at, gradient in zip(total, found, strict=True):
            at += gradient * min(1.0, clip / max(norm, 1e-12))
    return flat(total), np.array(norms)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def noise_of(model, std):
    """The noise that the first step adds: each parameter's is drawn by itself, in order."""
    entropy = Entropy(KEY)
    return flat(torch.from_numpy(std * entropy.normal(p.numel())) for p in model.parameters())


def gradient_of(model):
    return flat(p.grad for p in model.parameters() if p.requires_grad)


def weights_of(of, data, private, moment=None, augment=None):
    model = build_model(of, tuple(of.data.shape), seed=7)
    moment = moment or Moment(seed=1, round_number=1, rounds=3, site="north")
    layout = layout_of(model, of.model)
    train(
        model, layout, data, of, PlainSite(), None, moment,
        devices=[CPU], private=private, augment=augment,
    )  # fmt: skip
    return read_vector(model, layout)


def private(of, data, noise=1.0, clip=1.0, entropy=None):
    size = of.training.batch_size
    sampler = PoissonSampler(len(data), size)
    entropy = entropy or Entropy.from_system()
    return PrivateTraining(clip, noise, entropy, sampler)


@st.composite
def problems(draw):
    """A model of any kind over small random shapes, and rows for it."""
    kind = draw(st.sampled_from(["linear", "mlp", "cnn"]))
    side = st.integers(4, 7)
    shape = (draw(st.integers(1, 3)), draw(side), draw(side))
    arguments = {}
    if kind == "mlp":
        arguments["hidden"] = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
        arguments["activation"] = draw(st.sampled_from(["relu", "tanh", "gelu"]))
    if kind == "cnn":
        groups = draw(st.sampled_from([1, 2, 4]))
        widths = st.sampled_from([4, 8])
        arguments = {"channels": draw(st.lists(widths, min_size=1, max_size=2)), "groups": groups}
        arguments["hidden"] = draw(st.sampled_from([0, 5]))
    of = task(kind, shape, draw(st.sampled_from([0, 2, 5])), arguments=arguments)
    return of, rows(of, draw(st.integers(1, 9))), draw(st.sampled_from([0.5, 2.0, 50.0]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_the_clipped_sum_equals_that_of_one_record_at_a_time(problem):
    of, data, clip = problem
    model = build_model(of, tuple(of.data.shape), seed=2).train()
    reference, norms = one_by_one(model, of, data, clip)
    with engine(model, of, clip) as dp:
        found = flat(dp.clipped_sum(data.inputs, data.targets)).double()
    # Relative to what was added: in the sum, records cancel.
    assert float((found - reference).norm()) <= 1e-5 * np.minimum(norms, clip).sum()


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_one_record_moves_the_sum_by_the_clip_at_most(model):
    of = task(model)
    data = rows(of, 9, scale=50.0)
    built = build_model(of, (1, 6, 6), seed=2).train()
    for clip in (0.01, 1.0):
        _, norms = one_by_one(built, of, data, clip)
        assert (norms > clip).sum() >= 4, "the bound must matter"
        with engine(built, of, clip) as dp:
            whole = flat(dp.clipped_sum(data.inputs, data.targets)).double()
            for left_out in range(9):
                kept = [n for n in range(9) if n != left_out]
                rest = flat(dp.clipped_sum(data.inputs[kept], data.targets[kept])).double()
                alone = slice(left_out, left_out + 1)
                single = flat(dp.clipped_sum(data.inputs[alone], data.targets[alone])).double()
                assert float(single.norm()) <= clip * (1 + 1e-5)
                assert float((whole - rest).norm()) <= clip * (1 + 1e-4)


def test_frozen_tensors_are_neither_in_the_norm_nor_in_the_sum():
    of = task(frozen=["1.*"])
    model = build_model(of, (1, 6, 6), seed=2).train()
    data = rows(of, 6)
    reference, norms = one_by_one(model, of, data, 9.5)
    assert 0 < (norms > 9.5).sum() < 6
    with engine(model, of, clip=9.5) as dp:
        found = flat(dp.clipped_sum(data.inputs, data.targets)).double()
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_batches_of_any_size_follow_each_other():
    of = task("cnn")
    model = build_model(of, (1, 6, 6), seed=2).train()
    data = rows(of, 9)
    with engine(model, of) as dp:
        for count in (3, 9, 1, 5):
            part = LocalRows(data.inputs[:count], data.targets[:count])
            reference, _ = one_by_one_without_hooks(of, model, part)
            found = flat(dp.clipped_sum(part.inputs, part.targets)).double()
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def one_by_one_without_hooks(of, model, data):
    twin = build_model(of, (1, 6, 6), seed=0).train()
    twin.load_state_dict(model.state_dict())
    return one_by_one(twin, of, data, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("broken", [[2], [0, 4], [0, 1, 2, 3, 4]])
def test_a_record_whose_gradient_overflows_counts_as_zero(value, broken):
    """A NaN in the sum would tell whoever chose the weights that the record is there."""
    of = task()
    model = build_model(of, (1, 6, 6), seed=2).train()
    with torch.no_grad():
        model[1].weight.mul_(1e3)
    data = rows(of, 5)
    kept = [n for n in range(5) if n not in broken]
    reference, _ = one_by_one(model, of, LocalRows(data.inputs[kept], data.targets[kept]), 1.0)
    data.inputs[broken] = value
    with engine(model, of) as dp:
        found = flat(dp.clipped_sum(data.inputs, data.targets)).double()
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
        # And the next batch is as if there had been none like it.
        fine = data.inputs[kept], data.targets[kept]
        if kept:
            again = flat(dp.clipped_sum(*fine)).double()
            torch.testing.assert_close(again, reference, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_the_loss_ignores_gets_noise_alone():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.head = nn.Linear(2, 2), nn.Linear(36, 3)

        def forward(self, images):
            return self.head(images.flatten(1))

    of, model = task(), Idle().train()
    data = rows(of, 5)
    reference, _ = one_by_one(model.head, of, LocalRows(data.inputs.flatten(1), data.targets), 1.0)
    with engine(model, of, noise=2.0, expected=1) as dp:
        found = flat(dp.clipped_sum(data.inputs, data.targets)).double()
        dp.gradient(data.inputs, data.targets)
    assert not found[:6].any()
    torch.testing.assert_close(found[6:], reference, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient_of(model)[:6], noise_of(model, 2.0)[:6])


def traces(model):
    """Everything that hangs on a model and its parameters."""
    return (
        list(model.state_dict()),
        [sorted(vars(module)) for module in model.modules()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        [sorted(vars(parameter)) for parameter in model.parameters()],
    )


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_nothing_of_the_engine_stays_on_the_model(model):
    of = task(model)
    built, untouched = (build_model(of, (1, 6, 6), seed=2).train() for _ in range(2))
    before = traces(built)
    data = rows(of, 9)
    with engine(built, of) as dp:
        dp.gradient(data.inputs, data.targets)
        assert traces(built) != before
    assert traces(built) == before
    # A plain pass afterwards sees a plain model.
    for each in (built, untouched):
        each.zero_grad()
        functional.cross_entropy(each(data.inputs), data.targets).backward()
    assert torch.equal(gradient_of(built), gradient_of(untouched))


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    of = task("cnn")
    model = build_model(of, (1, 6, 6), seed=2).train()
    before, data = traces(model), rows(of, 9)
    dp = engine(model, of, loss=lambda outputs, targets: [][0])
    with pytest.raises(IndexError), dp:
        dp.clipped_sum(data.inputs, data.targets)
    assert traces(model) == before
    reference, _ = one_by_one(model, of, data, 1.0)
    with engine(model, of) as again:
        for count in (4, 9):
            found = flat(again.clipped_sum(data.inputs[:count], data.targets[:count])).double()
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_a_model_s_own_activations_are_not_taken_for_leftovers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(36, 4), nn.Linear(4, 3)
            self.activations = nn.ModuleList([nn.Tanh()])

        def forward(self, images):
            return self.second(self.activations[0](self.first(images.flatten(1))))

    of, model = task(), Own().train()
    data = rows(of, 5)
    with engine(model, of) as dp:
        dp.gradient(data.inputs, data.targets)
    assert model(data.inputs).shape == (5, 3)


def test_an_empty_batch_adds_noise_and_nothing_else():
    of = task()
    model = build_model(of, (1, 6, 6), seed=2).train()
    with engine(model, of, clip=0.5, noise=2.0, expected=4) as dp:
        dp.gradient(torch.empty(0, 1, 6, 6), torch.empty(0, dtype=torch.int64))
    expected = noise_of(model, 2.0 * 0.5) / 4
    torch.testing.assert_close(gradient_of(model), expected, rtol=1e-6, atol=0)


def test_noise_reaches_a_tensor_that_is_not_contiguous_in_its_own_order():
    tall = torch.zeros(3, 5)
    add_noise(tall.T, 1.5, Entropy(KEY))
    expected = 1.5 * Entropy(KEY).normal(15).reshape(5, 3)
    torch.testing.assert_close(tall.T, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_the_sum_is_divided_by_the_expected_batch_not_by_the_drawn_one():
    of = task()
    model = build_model(of, (1, 6, 6), seed=2).train()
    for drawn in (2, 9):
        data = rows(of, drawn)
        with engine(model, of, expected=5) as dp:
            total = flat(dp.clipped_sum(data.inputs, data.targets))
            dp.gradient(data.inputs, data.targets)
        torch.testing.assert_close(gradient_of(model), (total / 5).float())


@pytest.mark.parametrize(("noise", "clip"), [(1.3, 0.7), (0.4, 3.0)])
def test_the_noise_has_the_promised_standard_deviation(noise, clip):
    of = task("linear")
    model = build_model(of, (1, 6, 6), seed=2).train()
    nothing = torch.empty(0, 1, 6, 6), torch.empty(0, dtype=torch.int64)
    draws = []
    with engine(model, of, noise=noise, clip=clip, expected=8, entropy=Entropy.from_system()) as dp:
        for _ in range(300):
            dp.gradient(*nothing)
            draws.append(8 * gradient_of(model))
    drawn = torch.stack(draws)
    assert float(drawn.std()) == pytest.approx(noise * clip, rel=0.03)
    assert abs(float(drawn.mean())) < 5 * noise * clip / math.sqrt(drawn.numel())
    # Each parameter and each step has its own.
    assert drawn.flatten().unique().numel() > 0.99 * drawn.numel()


def test_noise_is_added_to_what_a_step_applies():
    of, data = task(epochs=None, steps=1, batch_size=20), rows(task(), 20)
    without = weights_of(of, data, private(of, data, noise=0.0, clip=1e-4))
    start = weights_of(replace(of, training=replace(of.training, learning_rate=1e-30)), data, None)
    # Sampling rate 1: the step is the same but for the noise.
    moved = without.astype(np.float64) - start
    assert 0 < np.linalg.norm(moved) <= 0.1 * 1e-4 * 20 / 20 * 1.01
    with_noise = weights_of(of, data, private(of, data, noise=1e4, clip=1e-4))
    with_noise = with_noise.astype(np.float64) - start
    assert with_noise.std() == pytest.approx(0.1 * 1e4 * 1e-4 / 20, rel=0.1)


def test_private_training_cannot_be_seeded_and_plain_training_can():
    of, data = task(), rows(task(), 40)

    def run(how):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - what an attacker would try
            return weights_of(of, data, how() if how else None)

    assert not np.array_equal(run(lambda: private(of, data)), run(lambda: private(of, data)))
    assert run(None).tobytes() == run(None).tobytes()


def test_sampling_cannot_be_seeded_either():
    of, data = task(epochs=None, steps=3, batch_size=10), rows(task(), 40)

    def run():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - what an attacker would try
            return weights_of(of, data, private(of, data, noise=0.0))

    assert not np.array_equal(run(), run())


def test_the_same_entropy_gives_the_same_private_model():
    of, data = task(), rows(task(), 40)
    one, two = (weights_of(of, data, private(of, data, entropy=Entropy(KEY))) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_a_batch_larger_than_the_site_divides_by_the_site_s_rows():
    """All rows are in every step, so their number is the expected batch."""
    data = rows(task(), 20)
    small, large = (
        weights_of(of, data, private(of, data, noise=0.0))
        for of in (task(batch_size=n, epochs=None, steps=1) for n in (20, 500))
    )
    assert small.tobytes() == large.tobytes()


def test_augmentation_under_dp_is_not_drawn_from_the_run_s_seed():
    """A known seed would let one record change the draws, hence the gradients, of all behind it."""
    of = replace(
        task(epochs=None, steps=2, batch_size=20), augmentation=[Step("noise", {"std": 1.0})]
    )
    data, augment = rows(of, 20), build_augmentation(of)
    # All rows in every step and no noise: what is left to differ is the augmentation.
    one, two = (
        weights_of(of, data, private(of, data, noise=0.0), augment=augment) for _ in range(2)
    )
    assert not np.array_equal(one, two)
    plain = (weights_of(of, data, private(of, data, noise=0.0)) for _ in range(2))
    assert len({weights.tobytes() for weights in plain}) == 1


def test_every_step_draws_a_poisson_sample(monkeypatch):
    sizes = []

    class Counting(DpSgd):
        def gradient(self, inputs, targets):
            sizes.append(len(targets))
            super().gradient(inputs, targets)

    monkeypatch.setattr(local, "DpSgd", Counting)
    of = task("linear", epochs=None, steps=200, batch_size=2)
    data = rows(of, 40)
    weights_of(of, data, private(of, data))
    assert len(sizes) == 200
    assert 0 in sizes, "an empty sample is a step too"
    assert np.mean(sizes) == pytest.approx(2, abs=0.6)
    assert np.var(sizes) == pytest.approx(1.9, rel=0.6)


class Centred(nn.Module):
    """Takes the mean of the batch out of each record: no layer of it is suspicious."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 2)

    def forward(self, images):
        outputs = self.head(images.flatten(1))
        return outputs - outputs.mean(dim=0)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)),
        Centred(),
    ],
)
def test_a_model_that_mixes_records_is_refused_and_its_mode_kept(model):
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(TaskError) as caught:
            check_model(model, torch.randn(2, 1, 6, 6))
        assert (caught.value.code, caught.value.problems[0].key) == ("LF3302", "task.model")
        assert model.training is mode


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_the_models_that_are_shipped_mix_no_records(model):
    check_model(build_model(task(model), (1, 6, 6), seed=0), torch.randn(2, 1, 6, 6))


def test_bf16_and_several_gpus_are_refused_with_dp():
    of = task()
    two = [torch.device("cuda", 0), torch.device("cuda", 1)]
    half = replace(of, numeric=replace(of.numeric, precision="bf16"))
    for given_task, devices, code in ((half, [CPU], "LF3305"), (of, two, "LF3304")):
        with pytest.raises(TaskError) as caught:
            train(
                build_model(of, (1, 6, 6), 0), None, rows(of, 4), given_task, PlainSite(), None,
                Moment(1, 1, 1, "north"), devices=devices, private=private(of, rows(of, 4)),
            )  # fmt: skip
        assert caught.value.code == code

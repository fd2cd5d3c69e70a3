"""Our training function against a loop of ten lines, to the bit."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.seeds import derive_seed
from lepton_fed.core.task import (
    DataContract,
    ModelSpec,
    Numeric,
    Schedule,
    Step,
    Target,
    Task,
    TrainingSpec,
)
from lepton_fed.data.augmentation import build_augmentation
from lepton_fed.errors import RunError
from lepton_fed.models.build import build_model, layout_of, read_vector
from lepton_fed.privacy.dp.sampling import sampler_of
from lepton_fed.strategies.base import PlainSite
from lepton_fed.strategies.fedprox import ProximalSite
from lepton_fed.training.device import _Cast
from lepton_fed.training.evaluation import evaluate
from lepton_fed.training.local import LocalRows, Moment, learning_rate_factor, steps_of, train

IMAGE = (1, 6, 6)
MOMENT = Moment(seed=11, round_number=2, rounds=5, site="north")
CPU = torch.device("cpu")


def task(model="mlp", target=None, numeric=None, arguments=None, **training):
    training = {"batch_size": 8, "learning_rate": 0.1, **training}
    return Task(
        data=DataContract("image", list(IMAGE), target=target or Target(classes=list("abc"))),
        model=ModelSpec(model, arguments or {}),
        training=TrainingSpec(**training),
        numeric=numeric or Numeric(),
        metrics=["accuracy"] if target is None else ["mae"],
    )


def rows(count=29, shape=IMAGE, number=False):
    draws = torch.Generator().manual_seed(4)
    inputs = torch.randn(count, *shape, generator=draws)
    if number:
        return LocalRows(inputs, inputs.flatten(1)[:, :5].sum(dim=1))
    return LocalRows(inputs, torch.randint(3, (count,), generator=draws))


def trained(of, data, rule=None, moment=MOMENT, augment=None, model=None):
    """Train as a site does; return the weights after it."""
    model = model or build_model(of, tuple(data.inputs.shape[1:]), seed=7)
    layout = layout_of(model, of.model)
    rule = rule or PlainSite()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = rule.begin(start, {}, {})
    train(model, layout, data, of, rule, memory, moment, devices=[CPU], augment=augment)
    return read_vector(model, layout)


def expected(of, data, optimiser, steps, loss=functional.cross_entropy, before_step=None):
    """Train by hand: shuffle, cut into batches, step."""
    model = build_model(of, tuple(data.inputs.shape[1:]), seed=7)
    optimiser = optimiser(model.parameters())
    seed = derive_seed(11, "shuffle", round_number=2, site="north")
    shuffle = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(len(data), generator=shuffle) for _ in itertools.count())
    batches = itertools.chain.from_iterable(order.split(of.training.batch_size) for order in epochs)
    for batch in itertools.islice(batches, steps):
        optimiser.zero_grad()
        loss(model(data.inputs[batch]), data.targets[batch]).backward()
        if before_step:
            before_step(model)
        optimiser.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def same_bits(one, two):
    return one.tobytes() == two.tobytes()


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize(
    ("settings", "optimiser"),
    [
        (
            {"momentum": 0.9, "weight_decay": 0.01},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        (
            {"optimiser": "adam", "weight_decay": 0.02},
            lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.02),
        ),
        (
            {"optimiser": "adamw", "weight_decay": 0.02},
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.02),
        ),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_training_equals_a_plain_loop_to_the_bit(model, settings, optimiser):
    of = task(model, epochs=2, **settings)
    # 29 rows in batches of 8: four steps an epoch, the last of five rows.
    assert same_bits(trained(of, rows()), expected(of, rows(), optimiser, steps=8))


def test_regression_equals_a_plain_loop_to_the_bit():
    def squared(outputs, targets):
        return (outputs[:, 0] - targets).square().mean()

    of = task("mlp", target=Target("number", "y"), learning_rate=0.01)
    data = rows(number=True)
    reference = expected(of, data, lambda p: torch.optim.SGD(p, lr=0.01), 4, squared)
    assert same_bits(trained(of, data), reference)


def test_clipping_the_gradient_equals_a_plain_loop_to_the_bit():
    clipped = []

    def clip(model):
        clipped.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)) > 0.5)

    of = task(max_gradient_norm=0.5, epochs=3)
    reference = expected(of, rows(), lambda p: torch.optim.SGD(p, lr=0.1), 12, before_step=clip)
    assert any(clipped), "the bound must matter"
    assert same_bits(trained(of, rows()), reference)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
def test_steps_go_over_the_rows_as_often_as_it_takes(steps):
    of = task(epochs=None, steps=steps)
    reference = expected(of, rows(), lambda p: torch.optim.SGD(p, lr=0.1), steps)
    assert same_bits(trained(of, rows()), reference)


def test_as_many_steps_as_epochs_have_are_the_epochs():
    data = rows()
    by_steps = trained(task(epochs=None, steps=8), data)
    assert same_bits(trained(task(epochs=2), data), by_steps)


def test_the_steps_of_a_round_are_counted():
    assert steps_of(TrainingSpec(epochs=3, batch_size=8), 29) == 12
    assert steps_of(TrainingSpec(epochs=3, batch_size=8), 32) == 12
    assert steps_of(TrainingSpec(epochs=1, batch_size=64), 29) == 1
    assert steps_of(TrainingSpec(epochs=None, steps=7), 29) == 7
    # Poisson: 29/8 steps take each row once in the mean, to the nearest step.
    assert steps_of(TrainingSpec(epochs=3, batch_size=8), 29, sampler_of("poisson", 29, 8)) == 12
    assert steps_of(TrainingSpec(epochs=2, batch_size=64), 29, sampler_of("poisson", 29, 64)) == 2
    for order in ("shuffled", "full"):
        assert steps_of(TrainingSpec(epochs=3, batch_size=8), 29, sampler_of(order, 29, 8)) == 12
        assert steps_of(TrainingSpec(epochs=1, batch_size=64), 29, sampler_of(order, 29, 64)) == 1


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Schedule(), {(1, 0.0): 1, (5, 0.75): 1}),
        (Schedule("linear"), {(1, 0.0): 1, (3, 0.5): 0.5, (5, 0.5): 0.1}),
        (Schedule("linear", final=0.2), {(1, 0.0): 1, (3, 0.5): 0.6, (5, 0.5): 0.28}),
        (Schedule("cosine"), {(1, 0.0): 1, (3, 0.5): 0.5, (2, 0.25): 0.5 + math.sqrt(0.125)}),
        (Schedule("cosine", final=0.2), {(1, 0.0): 1, (3, 0.5): 0.6}),
        (Schedule("step", every=2, factor=0.5), {(2, 0.9): 1, (3, 0): 0.5, (5, 0): 0.25}),
        (Schedule(warmup_rounds=2), {(1, 0.0): 1 / 11, (2, 0.0): 6 / 11, (3, 0.0): 1, (5, 0.0): 1}),
        (Schedule("linear", warmup_rounds=1), {(1, 0.0): 1 / 6, (2, 0.0): 0.8}),
    ],
)  # fmt: skip
def test_a_schedule_has_its_known_points(schedule, points):
    for (number, within), factor in points.items():
        assert learning_rate_factor(schedule, number, 5, within) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step"])
def test_a_schedule_never_stands_still_nor_exceeds_the_rate(name):
    schedule = Schedule(name, every=2, warmup_rounds=2)
    factors = [
        learning_rate_factor(schedule, number, 6, step / 4)
        for number in range(1, 7)
        for step in range(4)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] < factors[4], "it warms up"


def test_a_schedule_is_applied_at_every_step():
    of = task(schedule=Schedule("linear"))

    def optimiser(parameters):
        sgd = torch.optim.SGD(parameters, lr=0.1)
        # Round 2 of 5 stands at 1/5 of the run; each of its 4 steps takes 1/20 of it.
        rates = iter([0.1 * (1 - (1 + step / 4) / 5) for step in range(4)])
        sgd.register_step_pre_hook(lambda *_: sgd.param_groups[0].update(lr=next(rates)))
        return sgd

    assert same_bits(trained(of, rows()), expected(of, rows(), optimiser, steps=4))


@dataclass(frozen=True)
class PullByLoss(PlainSite):
    """mu/2 |w - start|^2 as a term of the loss."""

    mu: float = 0.3

    def begin(self, start, received, state):
        return start

    def loss(self, memory, parameters):
        squares = [(p - memory[name]).square().sum() for name, p in parameters.items()]
        return 0.5 * self.mu * torch.stack(squares).sum()


def test_a_term_of_a_site_rule_equals_the_term_in_the_loss():
    of, data = task("mlp", epochs=2, momentum=0.5), rows()
    model = build_model(of, IMAGE, seed=7)
    start = [p.detach().clone() for p in model.parameters()]

    def add_gradient(model):
        for parameter, at_first in zip(model.parameters(), start, strict=True):
            parameter.grad += 0.3 * (parameter.detach() - at_first)

    reference = expected(
        of, data, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), 8, before_step=add_gradient
    )
    plain = trained(of, data)
    by_loss = trained(of, data, PullByLoss())
    by_gradient = trained(of, data, ProximalSite(mu=0.3))
    np.testing.assert_allclose(by_loss, reference, rtol=0, atol=2e-6)
    np.testing.assert_allclose(by_gradient, reference, rtol=0, atol=2e-6)
    assert np.abs(plain - reference).max() > 1e-3, "the term must matter"


def test_a_site_rule_sees_the_shared_tensors_only():
    seen = []

    @dataclass(frozen=True)
    class Spy(PlainSite):
        def gradient(self, memory, name, parameter, gradient):
            seen.append(name)
            return torch.zeros_like(gradient)

    of = replace(task("mlp"), model=ModelSpec("mlp", local=["3.*"], frozen=["1.bias"]))
    model = build_model(of, IMAGE, seed=7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(of, rows(), Spy(), model=model)
    assert set(seen) == {"1.weight"}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"3.weight", "3.bias"}, "local tensors are trained, frozen ones are not"


def test_augmentation_is_drawn_from_the_round_s_generator():
    of = replace(
        task("cnn", arguments={"channels": [8]}),
        augmentation=[Step("flip"), Step("crop", {"padding": 1}), Step("noise", {"std": 0.1})],
    )
    augment, data = build_augmentation(of), rows()
    seed = derive_seed(11, "augment", round_number=2, site="north")
    drawing = torch.Generator().manual_seed(seed)

    class Augmented:
        """Rows that change whenever a batch of them is taken."""

        def __getitem__(self, batch):
            return augment(data.inputs[batch], drawing)

        shape = data.inputs.shape

    by_hand = expected(
        of, LocalRows(Augmented(), data.targets), lambda p: torch.optim.SGD(p, lr=0.1), steps=4
    )
    assert same_bits(trained(of, data, augment=augment), by_hand)
    assert not same_bits(trained(of, data), by_hand)
    later = replace(MOMENT, round_number=3)
    first = trained(of, data, augment=augment, moment=later)
    assert same_bits(first, trained(of, data, augment=augment, moment=later))


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize(
    "numeric",
    [Numeric(), Numeric(memory_format="channels_last"), Numeric(precision="bf16"), Numeric(2)],
)
def test_the_same_inputs_give_the_same_bits(model, numeric):
    of = task(model, numeric=numeric, momentum=0.9)
    assert same_bits(trained(of, rows()), trained(of, rows()))


@pytest.mark.parametrize(
    "other",
    [
        replace(MOMENT, seed=12),
        replace(MOMENT, round_number=3),
        replace(MOMENT, site="south"),
    ],
)
def test_seed_round_and_site_each_shuffle_differently(other):
    of = task("linear")
    assert not same_bits(trained(of, rows()), trained(of, rows(), moment=other))


def test_layers_that_draw_do_so_from_the_run_s_seed_and_leave_the_global_generator():
    of, data = task("linear"), rows()

    def run(moment=MOMENT):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
        with torch.no_grad():
            model[2].weight.fill_(0.01)
            model[2].bias.zero_()
        state = torch.get_rng_state()
        weights = trained(of, data, model=model, moment=moment)
        assert torch.equal(torch.get_rng_state(), state)
        return weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = run()
        torch.manual_seed(1)
        assert same_bits(run(), first)
        assert not same_bits(run(replace(MOMENT, site="south")), first)


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    of = task("mlp", numeric=Numeric(precision="bf16"))
    model = build_model(of, IMAGE, seed=7)
    seen = []
    model[3].register_forward_hook(lambda module, given, outputs: seen.append(outputs.dtype))
    weights = trained(of, rows(), model=model)
    assert set(seen) == {torch.bfloat16}
    assert weights.dtype == np.float32
    exact = trained(task("mlp"), rows())
    assert 0 < np.abs(weights - exact).max() < 0.05


def test_a_model_that_is_called_in_another_thread_keeps_its_precision():
    """As DataParallel calls it: autocast belongs to a thread."""
    model = _Cast(nn.Linear(4, 4), Numeric(precision="bf16"), CPU)
    found = []
    worker = threading.Thread(target=lambda: found.append(model(torch.ones(2, 4)).dtype))
    worker.start()
    worker.join()
    assert found == [torch.bfloat16]


def settings():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_threads_and_kernels_are_put_back(fails):
    seen = []

    @dataclass(frozen=True)
    class Look(PlainSite):
        def gradient(self, memory, name, parameter, gradient):
            seen.append(settings())
            if fails:
                raise KeyError(name)
            return gradient

    before = settings()
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        chosen = settings()
        if fails:
            with pytest.raises(KeyError):
                trained(task("linear"), rows(), Look())
        else:
            trained(task("linear", numeric=Numeric(3, deterministic=False)), rows(), Look())
        assert settings() == chosen
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
    assert set(seen) == {(1, True, False) if fails else (3, False, False)}


def test_weights_that_are_no_longer_finite_end_the_training():
    with pytest.raises(RunError) as caught:
        trained(task("linear", learning_rate=1e38, epochs=9), rows())
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF5101", "north")
    assert "round 2" in problem.what


def test_a_row_that_is_not_a_number_ends_the_training():
    data = rows()
    data.inputs[3, 0, 0, 0] = math.nan
    with pytest.raises(RunError, match="LF5101"):
        trained(task("mlp"), data)


def test_channels_last_changes_the_layout_and_hardly_the_result():
    of = task("cnn", numeric=Numeric(memory_format="channels_last"))
    model = build_model(of, IMAGE, seed=7)
    weights = trained(of, rows(), model=model)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(weights, trained(task("cnn"), rows()), rtol=0, atol=1e-5)


def plain_counts(model, data):
    """The loss's sum and the hits, one row at a time."""
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(row[None]) for row in data.inputs])
    loss = functional.cross_entropy(outputs.double(), data.targets, reduction="sum")
    return float(loss), int((outputs.argmax(dim=1) == data.targets).sum())


@pytest.mark.parametrize("count", [0, 1, 29, 1025])
def test_evaluation_equals_a_plain_computation(count):
    of, data = task("mlp"), rows(count)
    model = build_model(of, IMAGE, seed=7)
    plan = MetricsPlan.of(of)
    counts = evaluate(model, data, of, plan, CPU)
    assert counts.shape == (plan.size,)
    if not count:
        assert not counts.any()
        return
    loss, hits = plain_counts(model, data)
    values = plan.values(counts)
    assert values["accuracy"] == pytest.approx(hits / count, abs=1e-12)
    assert values["loss"] == pytest.approx(loss / count, rel=1e-5)


def test_evaluation_of_numbers_equals_a_plain_computation():
    of, data = task("linear", target=Target("number", "y")), rows(40, number=True)
    model = build_model(of, IMAGE, seed=7)
    plan = MetricsPlan.of(of)
    values = plan.values(evaluate(model, data, of, plan, CPU))
    with torch.no_grad():
        errors = model(data.inputs)[:, 0].double() - data.targets.double()
    assert values["mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-5)
    assert values["loss"] == pytest.approx(float(errors.square().mean()), rel=1e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_evaluation_leaves_a_model_that_trains_as_before(model):
    of = task(model, numeric=Numeric(memory_format="channels_last"), momentum=0.9)
    built = build_model(of, IMAGE, seed=7)
    for mode in (True, False):
        built.train(mode)
        evaluate(built, rows(5), of, MetricsPlan.of(of), CPU)
        assert built.training is mode
        assert all(p.requires_grad and p.grad is None for p in built.parameters())
    assert torch.is_grad_enabled()
    assert same_bits(trained(of, rows(), model=built), trained(of, rows()))


def test_a_model_that_fails_in_evaluation_is_put_back_in_training_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 3)).train()
    of = task("linear")
    with pytest.raises(RuntimeError):
        evaluate(model, rows(), of, MetricsPlan.of(of), CPU)
    assert model.training
    assert torch.is_grad_enabled()


def test_evaluation_does_not_change_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of = task("linear")
    evaluate(model, rows(), of, MetricsPlan.of(of), CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

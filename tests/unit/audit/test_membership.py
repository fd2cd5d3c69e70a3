"""Telling members from others: against what is known of Gaussians, and of plain gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lepton_fed.audit.inversion import class_means, divided, error_of, matched
from lepton_fed.audit.membership import confidence, lira, most_true_positives
from lepton_fed.audit.unmixing import Unmixing
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.local import LocalRows

CONTRACT = DataContract(
    columns=[Column(name) for name in "abcdef"], target=Target(classes=["no", "yes", "maybe"])
)
TASK = Task(data=CONTRACT, model=ModelSpec("mlp", {"hidden": [16], "activation": "tanh"}))


def rows(count: int, seed: int = 1) -> LocalRows:
    draws = np.random.default_rng(seed)
    inputs = torch.from_numpy(draws.standard_normal((count, 6), np.float32))
    return LocalRows(inputs, torch.from_numpy(draws.integers(0, 3, count)))


def gradient(kit: TaskKit, data: LocalRows) -> np.ndarray:
    """The sum of the records' gradients at the first weights, by one backward pass."""
    kit.model.zero_grad()
    torch.nn.functional.cross_entropy(
        kit.model(data.inputs), data.targets, reduction="sum"
    ).backward()
    return kit.layout.gather(
        {n: p.grad.numpy() for n, p in kit.model.named_parameters() if p.grad is not None}
    )


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.0])
def test_of_a_gaussian_that_is_shifted_it_finds_what_the_best_test_does(shift: float) -> None:
    draws = np.random.default_rng(2)
    included = draws.random((200, 300)) < 0.5
    values = draws.standard_normal((200, 300)) + shift * included
    found = lira(values[None], included, draws)
    best = 1.0 - NormalDist().cdf(NormalDist().inv_cdf(0.99) - shift)
    assert found.low <= best * 1.02
    assert found.high >= best * 0.85
    assert found.auc == pytest.approx(NormalDist().cdf(shift / math.sqrt(2)), abs=0.01)
    assert found.members == included.sum()


def test_a_statistic_that_says_nothing_does_not_spoil_one_that_does() -> None:
    draws = np.random.default_rng(3)
    included = draws.random((100, 200)) < 0.5
    telling = draws.standard_normal((100, 200)) + 4 * included
    alone = lira(telling[None], included, draws)
    both = lira(np.stack([telling, draws.standard_normal((100, 200))]), included, draws)
    assert both.tpr > 0.9 * alone.tpr


def test_what_the_records_of_a_training_have_in_common_widens_the_interval() -> None:
    draws = np.random.default_rng(4)
    included = draws.random((40, 300)) < 0.5
    noise = draws.standard_normal((40, 300))
    apart = lira((noise + 4 * included * (draws.random((40, 300)) < 0.5))[None], included, draws)
    found = lira((noise + 4 * included * (draws.random((40, 1)) < 0.5))[None], included, draws)
    assert found.high - found.low > 1.5 * (apart.high - apart.low)


def test_the_bound_is_that_of_dp_and_ends_at_one() -> None:
    assert most_true_positives(0.5, 1e-5) == pytest.approx(math.exp(0.5) / 100 + 1e-5)
    assert most_true_positives(5.0, 1e-5) == 1.0
    assert most_true_positives(1e6, 1e-5) == 1.0


def test_confidence_is_the_log_odds_of_the_class_or_of_the_error() -> None:
    outputs = torch.tensor([[1.0, 2.0, 0.5], [torch.nan, 0.0, 0.0]])
    targets = torch.tensor([1, 0])
    own = torch.softmax(outputs[0].double(), 0)[1]
    found = confidence(outputs, targets, TASK)
    assert found[0] == pytest.approx(float(torch.log(own / (1 - own))))
    assert np.isfinite(found).all()
    numbers = replace(TASK, data=replace(CONTRACT, target=Target(kind="number")))
    near, far = confidence(torch.tensor([[1.1], [3.0]]), torch.tensor([1.0, 1.0]), numbers)
    assert near > far


def test_the_shares_of_records_in_one_plain_step_are_found() -> None:
    kit, everyone = build_kit(TASK, 1), rows(12)
    inside = np.random.default_rng(5).random(12) < 0.5
    some = LocalRows(everyone.inputs[inside], everyone.targets[inside])
    unmixing = Unmixing(kit, everyone, math.inf, 0.0, np.random.default_rng(6))
    found = unmixing.shares(-0.1 * gradient(kit, some))
    assert found[inside].min() > found[~inside].max()


def test_the_more_noise_the_less_is_made_of_it() -> None:
    kit, everyone = build_kit(TASK, 1), rows(40)
    noise = np.random.default_rng(7).standard_normal(kit.layout.size).astype(np.float32)
    draws = np.random.default_rng(8)
    calm, wild = (
        np.abs(Unmixing(kit, everyone, 1.0, variance, draws).shares(noise)).mean()
        for variance in (100.0, 0.0)
    )
    assert calm < 0.1 * wild


def test_a_lone_record_is_divided_out_of_its_update_and_matched_nearly() -> None:
    kit, one = build_kit(TASK, 1), rows(1)
    update = -0.3 * gradient(kit, one)
    true = one.inputs.double().numpy()
    quotient = divided(kit, update, (-4.0, 4.0))
    assert quotient is not None
    assert error_of(quotient[None], true) < 1e-4
    found = matched(kit, update, one.targets, (-4.0, 4.0), np.random.default_rng(9))
    means = class_means(kit, rows(200, seed=2))
    guess = error_of(means[[int(one.targets[0])]], true)
    assert error_of(found, true) < guess / 3


def test_nothing_is_divided_where_no_layer_takes_a_whole_record() -> None:
    contract = DataContract(kind="image", shape=[1, 8, 8], target=Target(classes=["a", "b"]))
    kit = build_kit(Task(data=contract, model=ModelSpec("cnn")), 1)
    assert divided(kit, kit.initial, (0.0, 1.0)) is None


def test_a_class_that_nobody_has_is_guessed_by_the_mean_of_all() -> None:
    kit, some = build_kit(TASK, 1), rows(50)
    some = LocalRows(some.inputs, some.targets.clamp(max=1))
    means = class_means(kit, some)
    np.testing.assert_allclose(means[2], some.inputs.double().mean(dim=0).numpy())
    ones = some.inputs[some.targets == 1].double().mean(dim=0).numpy()
    np.testing.assert_allclose(means[1], ones)


def test_several_records_are_compared_in_the_order_that_fits_best() -> None:
    true = np.arange(6.0).reshape(3, 2)
    assert error_of(true[[2, 0, 1]], true) == 0.0
    assert error_of(true + 1.0, true) == pytest.approx(1.0)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lepton_fed.config import plugins
from lepton_fed.core.ring import RingEncoding, RingSum
from lepton_fed.errors import ConfError
from lepton_fed.strategies.base import DELTA, PlainSite, Strategy, Sum
from lepton_fed.strategies.fedavg import AddMean, fedavg


def named(**arguments: object) -> Strategy:
    """The strategy as a conf names it."""
    found = plugins.call("strategies", "fedavg", arguments, key="strategy.arguments")
    assert isinstance(found, Strategy)
    return found


def mean_of(deltas: list[np.ndarray[Any, Any]], weights: list[float]) -> Sum:
    encoding = RingEncoding.plan(cohort=len(deltas), coordinate_bound=1e4, weight_bound=10.0)
    total = RingSum(encoding, len(deltas[0]))
    for delta, weight in zip(deltas, weights, strict=True):
        total.add(delta, weight)
    return Sum(1, {DELTA: total.mean()}, tuple(f"s{i}" for i in range(len(deltas))), 1.0, 9)


def some_round(
    seed: int = 0,
) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]], list[float]]:
    rng = np.random.default_rng(seed)
    deltas = [rng.normal(size=50).astype(np.float32) for _ in range(4)]
    return rng.normal(size=50).astype(np.float32), deltas, [1.0, 2.5, 10.0, 0.125]


def test_one_step_is_the_weighted_mean_in_double_precision() -> None:
    model, deltas, weights = some_round()
    strategy = named()
    state, moved = strategy.server.step({}, model, mean_of(deltas, weights))
    mean = np.average(np.asarray(deltas, dtype=np.float64), axis=0, weights=weights)
    expected = (model + mean).astype(np.float32)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-7)
    assert state == {}


def test_the_models_of_the_sites_are_averaged() -> None:
    model, deltas, weights = some_round(1)
    _, moved = named().server.step({}, model, mean_of(deltas, weights))
    models = [model.astype(np.float64) + delta for delta in deltas]
    np.testing.assert_allclose(moved, np.average(models, axis=0, weights=weights), atol=1e-6)


@pytest.mark.parametrize("rate", [0.25, 1, 3.0])
def test_the_server_learning_rate_is_a_factor_on_the_mean(rate: float) -> None:
    model, deltas, weights = some_round(2)
    aggregate = mean_of(deltas, weights)
    _, moved = named(server_learning_rate=rate).server.step({}, model, aggregate)
    expected = model.astype(np.float64) + rate * aggregate.mean[DELTA]
    assert np.array_equal(moved, expected.astype(np.float32))


def test_the_model_that_a_step_is_given_is_not_changed() -> None:
    model, deltas, weights = some_round(3)
    before = model.copy()
    named().server.step({}, model, mean_of(deltas, weights))
    assert np.array_equal(model, before)


def test_small_steps_are_added_before_rounding() -> None:
    """In single precision 1 + 3e-8 is 1; ten of them at once must not vanish."""
    aggregate = Sum(1, {DELTA: np.array([3e-8])}, ("a",), 1.0, 1)
    _, moved = named(server_learning_rate=10.0).server.step({}, np.ones(1, np.float32), aggregate)
    assert moved[0] == np.float32(1 + 3e-7)


def test_a_step_out_of_the_range_of_single_precision_is_infinite_and_no_warning() -> None:
    aggregate = Sum(1, {DELTA: np.array([1e6, 0.0])}, ("a",), 1.0, 1)
    _, moved = AddMean(1e38).step({}, np.ones(2, np.float32), aggregate)
    assert moved.tolist() == [math.inf, 1.0]


def test_it_needs_the_sum_only_and_refuses_single_updates() -> None:
    class Singles:
        round_number = 1
        contributors = ("a",)

        def weight(self, site: str) -> float:
            return 1.0

        def read(self, site: str, vector: str, part: slice) -> np.ndarray[Any, Any]:
            return np.zeros(1, np.float32)

    strategy = named()
    assert strategy.server.needs == "sum"
    assert strategy.server.init(np.zeros(1, np.float32)) == {}
    assert strategy.server.sends({}) == {}
    with pytest.raises(TypeError, match="works on a sum"):
        strategy.server.step({}, np.zeros(1, np.float32), Singles())


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"server_learning_rate": 0}, "server_learning_rate"),
        ({"server_learning_rate": -1.5}, "server_learning_rate"),
        ({"server_learning_rate": "fast"}, "server_learning_rate"),
        ({"server_learning_rate": True}, "server_learning_rate"),
        ({"server_learning_rate": math.nan}, "server_learning_rate"),
        ({"server_learning_rat": 1.0}, "server_learning_rat"),
        ({"mu": 0.1}, "mu"),
    ],
)
def test_an_argument_that_does_not_fit_is_named_by_its_key(
    arguments: dict[str, object], place: str
) -> None:
    with pytest.raises(ConfError) as caught:
        named(**arguments)
    assert caught.value.problems[0].key == f"strategy.arguments.{place}"
    assert plugins.check("strategies", "fedavg", arguments)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_not_positive_and_finite_is_refused_in_python_too(rate: float) -> None:
    with pytest.raises(ValueError, match="server learning rate"):
        fedavg(rate)


def test_the_plain_site_changes_nothing_and_sends_the_difference() -> None:
    import torch

    site = PlainSite()
    parameter, gradient = torch.ones(2), torch.tensor([1.0, 2.0])
    memory = site.begin({"w": parameter}, {}, {})
    assert site.loss(memory, {"w": parameter}) is None
    assert site.gradient(memory, "w", parameter, gradient) is gradient
    delta = np.ones(2, np.float32)
    vectors, state = site.update(memory, delta, 5, 0.1)
    assert list(vectors) == list(site.vectors) == [DELTA]
    assert vectors[DELTA] is delta
    assert state == {}

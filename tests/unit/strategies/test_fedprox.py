from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lepton_fed.config import plugins
from lepton_fed.errors import ConfError
from lepton_fed.strategies.base import Strategy
from lepton_fed.strategies.fedprox import fedprox


def named(**arguments: object) -> Strategy:
    """The strategy as a conf names it."""
    found = plugins.call("strategies", "fedprox", arguments, key="strategy.arguments")
    assert isinstance(found, Strategy)
    return found


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("mu", [0, 0.01, 1.0, 17.5])
def test_the_gradient_is_that_of_the_proximal_term_in_the_loss(mu: float) -> None:
    start, present, data = tensors(1), tensors(2), tensors(3)

    rule = named(mu=mu).site
    memory = rule.begin(start, {}, {})
    found = {
        name: rule.gradient(memory, name, present[name], data[name].clone()) for name in present
    }

    leaves = {name: value.clone().requires_grad_() for name, value in present.items()}
    distance = sum((leaves[name] - start[name]).square().sum() for name in leaves)
    # The loss of the data is linear here, so that its gradient is `data` itself.
    loss = mu / 2 * distance + sum((leaves[name] * data[name]).sum() for name in leaves)
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad)


def test_with_mu_zero_the_gradient_stays_as_it_is() -> None:
    rule = named(mu=0).site
    memory = rule.begin(tensors(1), {}, {})
    gradient = tensors(3)["weight"]
    expected = gradient.clone()
    assert torch.equal(rule.gradient(memory, "weight", tensors(2)["weight"], gradient), expected)


def test_neither_the_start_nor_the_parameter_is_changed() -> None:
    start, present = tensors(1), tensors(2)
    rule = named(mu=2.0).site
    memory = rule.begin(start, {}, {})
    rule.gradient(memory, "weight", present["weight"], tensors(3)["weight"])
    assert torch.equal(start["weight"], tensors(1)["weight"])
    assert torch.equal(present["weight"], tensors(2)["weight"])


def test_the_gradient_builds_no_graph() -> None:
    start = tensors(1)
    rule = named(mu=2.0).site
    parameter = tensors(2)["bias"].requires_grad_()
    found = rule.gradient(rule.begin(start, {}, {}), "bias", parameter, torch.zeros(3))
    assert not found.requires_grad


def test_the_term_is_not_added_twice() -> None:
    """It is written as a gradient; a term in the loss beside it would double the pull."""
    rule = named(mu=1.0).site
    assert rule.loss(rule.begin(tensors(1), {}, {}), tensors(2)) is None


def test_sites_are_pulled_back_towards_the_received_model() -> None:
    start = {"w": torch.zeros(2)}
    rule = named(mu=1.0).site
    memory = rule.begin(start, {}, {})
    parameter = torch.tensor([4.0, -4.0])
    for _ in range(100):
        step = rule.gradient(memory, "w", parameter, torch.zeros(2))
        parameter = parameter - 0.1 * step
    assert parameter.abs().max() < 1e-3


def test_the_server_half_is_that_of_federated_averaging() -> None:
    strategy = named(mu=0.1, server_learning_rate=0.5)
    plain = plugins.call("strategies", "fedavg", {"server_learning_rate": 0.5})
    assert strategy.server == plain.server
    assert strategy.name == "fedprox"


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"mu": -0.1}, "mu"),
        ({"mu": "strong"}, "mu"),
        ({"mu": False}, "mu"),
        ({"mu": math.nan}, "mu"),
        ({"server_learning_rate": 0}, "server_learning_rate"),
        ({"MU": 1}, "MU"),
    ],
)
def test_an_argument_that_does_not_fit_is_named_by_its_key(
    arguments: dict[str, object], place: str
) -> None:
    with pytest.raises(ConfError) as caught:
        named(**arguments)
    assert caught.value.problems[0].key == f"strategy.arguments.{place}"


@pytest.mark.parametrize("mu", [-1e-9, math.nan, math.inf])
def test_a_mu_that_is_negative_or_not_finite_is_refused_in_python_too(mu: float) -> None:
    with pytest.raises(ValueError, match="mu must be finite and not negative"):
        fedprox(mu)

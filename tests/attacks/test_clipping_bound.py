"""A coordinator that chooses the weights cannot make one record add more than the clip.

The ways to try: gradients so small or large that their squares vanish or overflow in single
precision, and gradients that cancel within a record, so that what rounding leaves is all there is.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lepton_fed.privacy.dp.engines.base import EngineName
from lepton_fed.privacy.dp.engines.build import build_engine

SAFE: list[EngineName] = ["hooks", "bookkeeping"]
WIDTH = 64  # two places of this width are kept as factors, not in full


def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def added(engine: EngineName, model: nn.Module, inputs: torch.Tensor, clip: float) -> torch.Tensor:
    """Return what these records add to the sum, without noise."""
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    with build_engine(engine, model.train(), losses, clip) as summing:
        found = summing.clipped_sum(inputs, targets)
    return torch.cat([part.flatten() for part in found]).double()


class Differences(nn.Module):
    """One layer on two places of a record; the answer is made of the difference."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, width, bias=False)
        self.head = nn.Linear(width, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.zero_()  # so the head gets no gradient that would clip the rest
            self.head.weight.copy_(scale * torch.randn(2, width))

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        first, second = self.layer(places).unbind(1)
        return self.head(first - second)


@pytest.mark.parametrize("engine", SAFE)
@pytest.mark.parametrize("width", [2, WIDTH])
def test_gradients_that_cancel_within_a_record(engine: EngineName, width: int) -> None:
    torch.manual_seed(1)
    place = torch.randn(1, 1, WIDTH)
    exponents = itertools.product((-6, 0, 6, 12, 24), (-8, -7, -6, -4, 0))
    for scale, apart in exponents:
        model = Differences(width, 10.0**scale)
        inputs = torch.cat([place, place * (1 + 10.0**apart)], dim=1)
        for clip in (1e-3, 1.0):
            assert float(added(engine, model, inputs, clip).norm()) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("engine", SAFE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    exponents=st.lists(st.integers(-45, 38), min_size=6, max_size=6),
    data=st.integers(-45, 38),
    seed=st.integers(0, 1000),
    clip=st.sampled_from([1e-8, 1e-3, 1.0, 1e6]),
    kind=st.sampled_from(["vectors", "sequences", "images", "words"]),
)
def test_weights_of_any_size(
    engine: EngineName, exponents: list[int], data: int, seed: int, clip: float, kind: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = subject(kind, data)
        with torch.no_grad():
            for parameter, exponent in zip(model.parameters(), itertools.cycle(exponents)):
                parameter.copy_(torch.randn(parameter.shape).double() * 10.0**exponent)
                parameter.clamp_(-3e38, 3e38)
        for record in inputs.split(1):
            found = added(engine, model, record, clip)
            assert found.isfinite().all()
            assert float(found.norm()) <= clip * (1 + 1e-5)
        whole = added(engine, model, inputs, clip)
        assert whole.isfinite().all()
        assert float(whole.norm()) <= len(inputs) * clip * (1 + 1e-5)


def subject(kind: str, data: int) -> tuple[nn.Module, torch.Tensor]:
    """Return a model and records of a kind, as large as ``10**data``."""
    if kind == "vectors":
        model: nn.Module = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 2))
        inputs = torch.randn(3, 5)
    elif kind == "sequences":
        layers = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * WIDTH, 2))
        inputs = torch.randn(3, 2, WIDTH)
    elif kind == "images":
        layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 40, 3)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 2))
        inputs = torch.randn(3, 2, 5, 5)
    else:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(9, 2))
        return model, torch.randint(4, (3, 3))
    return model, (inputs.double() * 10.0**data).clamp(-3e38, 3e38).float()


def test_a_norm_that_vanishes_in_single_precision_does_not_let_a_record_pass() -> None:
    """The attack for which Opacus' ghost clipping is for simulations only."""
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(1e18)[1].neg_()
    inputs = torch.full((1, 50), 1e-24)
    clip = 1e-9
    gradient = 50 * 1e-24 * 1e18
    assert gradient > 1e4 * clip
    for engine in SAFE:
        found = float(added(engine, model, inputs, clip).norm())
        assert found == pytest.approx(clip, rel=1e-5)
        assert found <= clip * (1 + 1e-5)
    assert float(added("ghost", model, inputs, clip).norm()) > 1e3 * clip


@pytest.mark.parametrize("engine", SAFE)
def test_a_record_moves_a_sum_of_thousands_no_further_than_a_small_one(engine: EngineName) -> None:
    """In float32 such a sum is rounded by a hundred times more than is allowed."""
    torch.manual_seed(4)
    model = nn.Linear(30, 2)
    inputs = torch.randn(1, 30).expand(20_008, 30)
    sums = [added(engine, model, inputs[:count], 1.0) for count in range(20_000, 20_008)]
    for fewer, more in itertools.pairwise(sums):
        assert float((more - fewer).norm()) <= 1 + 1e-5


@pytest.mark.parametrize("engine", SAFE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_record_that_overflows_counts_as_zero_beside_others(
    engine: EngineName, value: float
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    inputs = torch.randn(5, 6)
    rest = added(engine, model, inputs[[0, 1, 3, 4]], 1.0)
    inputs[2] = value
    torch.testing.assert_close(added(engine, model, inputs, 1.0), rest, rtol=1e-5, atol=1e-7)
    assert not added(engine, model, inputs[2:3], 1.0).any()

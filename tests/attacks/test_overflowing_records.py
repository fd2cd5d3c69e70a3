"""A coordinator that chooses the weights cannot make one record show by an overflow.

Were a record's gradient infinite, zero times infinity would make the whole noised sum NaN, and the
site's failure would tell whether the record is there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.data.dataset import Dataset
from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.engines.base import EngineName
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import IndependentSteps
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.kit import build_kit

CLIP = 0.5


def clipped(model: nn.Module, inputs: torch.Tensor, engine: EngineName = "hooks") -> torch.Tensor:
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    with DpSgd(
        model,
        lambda outputs, wanted: functional.cross_entropy(outputs, wanted, reduction="none"),
        clip=CLIP,
        noise=IndependentSteps(0.0, Entropy(bytes(32))),
        expected_batch=1,
        engine=engine,
    ) as private:
        return torch.cat([part.flatten() for part in private.clipped_sum(inputs, targets)])


@pytest.mark.parametrize("engine", ["hooks", "bookkeeping"])
@given(
    exponents=st.lists(st.integers(-45, 38), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    last=st.sampled_from([0.0, 1.0, 1e20, 3e38]),
)
@settings(max_examples=60, deadline=None)
def test_one_record_changes_the_sum_by_at_most_the_clip_whatever_the_weights(
    engine: EngineName, exponents: list[int], seed: int, last: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter, exponent in zip(model.parameters(), exponents, strict=True):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 10.0**exponent)
            parameter.clamp_(-3e38, 3e38)
    inputs = torch.randn(5, 3, generator=generator)
    inputs[4] *= last
    with_record = clipped(model, inputs, engine)
    without = clipped(model, inputs[:4], engine)
    assert with_record.isfinite().all()
    assert without.isfinite().all()
    assert float((with_record - without).norm()) <= CLIP * (1 + 1e-4)


def test_a_model_that_overflows_on_one_record_gets_an_update_all_the_same(
    tmp_path: Path,
) -> None:
    task = Task(
        data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["n", "y"])),
        model=ModelSpec("mlp", {"hidden": [2]}),
        training=TrainingSpec(batch_size=40, learning_rate=0.1),
    )
    privacy = Privacy(RecordPrivacy(enabled=True, epsilon=8.0, delta=1e-3))
    agreement = Agreement("run", task, StrategyConf(), 1, 1, privacy)
    kit = build_kit(task, 1)
    crafted = kit.initial.copy()
    views = kit.layout.views(crafted)
    weights = [name for name in views if name.endswith("weight")]
    views[weights[0]][...] = [[0, 1e20], [0, 0]]  # lit by the second column only
    views[weights[1]][...] = [[1e20, 0], [-1e20, 0]]
    rows = Dataset(np.zeros((40, 2), np.float32), np.zeros(40, np.int64))
    victim = rows.inputs.copy()
    victim[7, 1] = 1.0
    for number, inputs in enumerate((rows.inputs, victim)):
        site = Site(
            "north",
            kit,
            PlainSite(),
            replace(rows, inputs=inputs),
            rows.take(np.arange(0)),
            agreement,
            devices=[torch.device("cpu")],
            folder=tmp_path / str(number),
        )
        ask = Ask(agreement.digest, kit.layout.digest, 1, True, False, {MODEL: crafted})
        reply = site.answer(ask)
        site.close()
        assert reply.refusal is None
        assert reply.update is not None
        assert np.isfinite(reply.update.vectors["delta"]).all()


@pytest.mark.parametrize(
    ("engine", "most_records", "at"),
    [
        ("bookkeeping", None, 0.0),
        ("bookkeeping", None, 1.0),
        ("bookkeeping", 1, 0.0),
        ("hooks", None, 1.0),
        ("hooks", 1000, 1.0),
    ],
)
def test_many_additions_do_not_carry_a_record_beyond_the_clip(
    engine: EngineName, most_records: int | None, at: float
) -> None:
    """In float32, steps of 1.25 last digits are 1 below a power of two and 2 above it."""
    steps, power = 4096, 2.0**12
    digit = power * 2.0**-24
    before = [1.0] * int(power - steps * digit)
    after = [1.25 * digit] * steps

    def total(gradients: list[float]) -> float:
        model = nn.Linear(2, 1, bias=at == 0.0)
        model.weight.requires_grad_(at != 0.0)
        with DpSgd(
            model,
            lambda outputs, wanted: outputs.squeeze(1) * wanted,
            clip=1.0,
            noise=IndependentSteps(0.0, Entropy(bytes(32))),
            expected_batch=1,
            engine=engine,
            most_records=most_records,
        ) as private:
            (found,) = private.clipped_sum(
                torch.tensor([[at, 0.0]]).expand(len(gradients), 2), torch.tensor(gradients)
            )
        return float(found.sum())

    moved = total([*before, 1.0, *after]) - total([*before, *after])
    assert abs(moved) <= 1.001  # it was 2

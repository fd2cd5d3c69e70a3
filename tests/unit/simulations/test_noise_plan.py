from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.task import (
    Aggregation,
    Column,
    DataContract,
    ModelSpec,
    Numeric,
    Target,
    Task,
    TrainingSpec,
)
from lepton_fed.errors import TaskError
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.noise import check_trainable, plan_noise

TASK = Task(
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("mlp", {"hidden": [4]}),
    training=TrainingSpec(epochs=2, batch_size=10),
)
RECORD = RecordPrivacy(enabled=True, epsilon=2.0, delta=1e-4)


@pytest.fixture(scope="module")
def kit() -> TaskKit:
    return build_kit(TASK, 1)


def code(kit: TaskKit, record: RecordPrivacy, rows: int, rounds: int) -> str:
    with pytest.raises(TaskError) as caught:
        plan_noise(kit, record, rows, rounds)
    return caught.value.code


def test_a_plan_spends_the_target_over_the_whole_run_and_no_more(kit: TaskKit) -> None:
    plan = plan_noise(kit, RECORD, rows=100, rounds=5)
    assert (plan.sampler.rate, plan.steps) == (0.1, 20)
    assert 1.97 < epsilon_of([plan.round_event] * 5, RECORD.delta) <= 2.0


@pytest.mark.parametrize("rows", [10_000, 20_000])
def test_a_delta_that_would_allow_one_row_to_be_published_is_refused(
    kit: TaskKit, rows: int
) -> None:
    assert code(kit, RECORD, rows, 5) == "LF3307"


def test_a_delta_just_below_one_over_the_rows_is_accepted(kit: TaskKit) -> None:
    assert plan_noise(kit, RECORD, rows=9_999, rounds=1).noise_multiplier > 0


def test_more_steps_than_can_be_accounted_are_refused_at_once(kit: TaskKit) -> None:
    assert code(kit, RECORD, 100, 1_000_000) == "LF3308"


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_the_shipped_models_can_be_trained_and_are_left_as_they_were(
    name: str, engine: str
) -> None:
    kit = build_kit(replace(TASK, model=ModelSpec(name)), 1)
    before = {key: value.clone() for key, value in kit.model.state_dict().items()}
    drawn = torch.get_rng_state()
    check_trainable(kit, replace(RECORD, engine=engine), devices=1)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = kit.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None for p in kit.model.parameters())


@pytest.mark.parametrize(
    ("task", "devices", "wanted"),
    [
        (replace(TASK, numeric=Numeric(precision="bf16")), 1, "LF3305"),
        (replace(TASK, aggregation=Aggregation("rows", weight_bound=100.0)), 1, "LF3309"),
        (TASK, 2, "LF3304"),
    ],
)
def test_what_does_not_go_with_dp_is_refused(task: Task, devices: int, wanted: str) -> None:
    with pytest.raises(TaskError) as caught:
        check_trainable(build_kit(task, 1), RECORD, devices)
    assert caught.value.code == wanted


class Centred(nn.Module):
    """Takes the batch's mean off: no layer of it is suspicious, but it mixes records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear(inputs - inputs.mean(dim=0))
        return outputs


class Tied(nn.Module):
    """Uses one layer twice: ghost norms do not add up there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.linear(self.linear(inputs))
        return outputs


def test_a_model_that_mixes_records_without_a_known_layer_is_refused(kit: TaskKit) -> None:
    with pytest.raises(TaskError) as caught:
        check_trainable(replace(kit, model=Centred()), RECORD, devices=1)
    assert caught.value.code == "LF3302"


def test_a_model_that_the_engine_cannot_handle_is_refused_before_a_run(kit: TaskKit) -> None:
    tied = replace(kit, model=Tied())
    check_trainable(tied, RECORD, devices=1)
    with pytest.raises(TaskError) as caught:
        check_trainable(tied, replace(RECORD, engine="ghost"), devices=1)
    assert caught.value.code == "LF3306"

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_the_shipped_models_can_be_trained_and_are_left_as_they_were(
    name: str,
) -> None:
    kit = build_kit(replace(TASK, model=ModelSpec(name)), 1)
    before = {key: value.clone() for key, value in kit.model.state_dict().items()}
    drawn = torch.get_rng_state()
    check_trainable(kit, RECORD, devices=1)
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

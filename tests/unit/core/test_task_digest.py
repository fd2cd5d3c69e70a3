"""The digest of a task is what coordinator and sites agree on: no field may be outside it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from lepton_fed.core.task import (
    Column,
    DataContract,
    ModelSpec,
    Step,
    Target,
    Task,
    TrainingSpec,
)

FULL = Task(
    data=DataContract(columns=[Column("age"), Column("ward", "category", ["a", "b"])]),
    preprocessing=[Step("impute", {"how": "mean"})],
    augmentation=[Step("noise")],
    model=ModelSpec(arguments={"hidden": [4]}),
)


def changes(value: Any, path: str = "task") -> Iterator[tuple[str, Any]]:
    """Yield a copy of a dataclass for each field below it, with that one field changed."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        present, place = getattr(value, field.name), f"{path}.{field.name}"
        for name, other in variants(present, hints[field.name], place):
            yield name, replace(value, **{field.name: other})


def variants(present: Any, hint: Any, place: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(present):
        yield from changes(present, place)
    elif get_origin(hint) is Literal:
        yield place, next(choice for choice in get_args(hint) if choice != present)
    elif isinstance(present, bool):
        yield place, not present
    elif isinstance(present, str):
        yield place, present + "x"
    elif isinstance(present, (int, float)):
        yield place, present + 1
    elif present is None:
        yield place, 7
    elif isinstance(present, dict):
        yield place, {**present, "new": 1}
    else:
        yield place, [*present, Step("new") if get_args(hint)[0] is Step else "new"]
        for index, item in enumerate(present):
            if is_dataclass(item):
                for name, other in changes(item, f"{place}[{index}]"):
                    yield name, [*present[:index], other, *present[index + 1 :]]


VARIANTS = list(changes(FULL))


def test_every_field_of_every_part_is_varied() -> None:
    places = [place for place, _ in VARIANTS]
    assert len(places) == len(set(places))
    for place in (
        "task.name",
        "task.data.columns[0].std",
        "task.data.target.kind",
        "task.preprocessing[0].arguments",
        "task.training.schedule.warmup_rounds",
        "task.aggregation.norm_bound",
        "task.numeric.threads",
    ):
        assert place in places


@pytest.mark.parametrize(("place", "changed"), VARIANTS, ids=[place for place, _ in VARIANTS])
def test_a_change_of_any_field_changes_the_digest(place: str, changed: Task) -> None:
    assert changed != FULL, place
    assert changed.digest != FULL.digest


def test_all_changes_have_digests_of_their_own() -> None:
    assert len({changed.digest for _, changed in VARIANTS}) == len(VARIANTS)


def test_equal_tasks_have_equal_digests() -> None:
    assert deepcopy(FULL).digest == FULL.digest
    assert Task().digest == Task().digest
    assert len(Task().digest) == 64


def test_the_order_of_arguments_does_not_matter_and_that_of_steps_does() -> None:
    one = replace(FULL, model=ModelSpec("mlp", {"a": 1, "b": 2}))
    two = replace(FULL, model=ModelSpec("mlp", {"b": 2, "a": 1}))
    assert one.digest == two.digest
    steps = [Step("impute"), Step("scale")]
    forward, backward = replace(FULL, preprocessing=steps), replace(FULL, preprocessing=steps[::-1])
    assert forward.digest != backward.digest


def test_a_value_that_moves_to_another_key_is_another_task() -> None:
    epochs = replace(FULL, training=TrainingSpec(epochs=5, steps=None))
    steps = replace(FULL, training=TrainingSpec(epochs=None, steps=5))
    assert epochs.digest != steps.digest


def test_sizes_follow_from_the_contract() -> None:
    table = DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["x", "y", "z"]))
    assert Task(data=table).outputs == 3
    image = DataContract("image", [1, 8, 8], target=Target("number"))
    assert Task(data=image).outputs == 1

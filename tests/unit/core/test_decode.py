from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_fed.core.decode import decode, strict_json, task_from_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.task import (
    Column,
    DataContract,
    ModelSpec,
    Numeric,
    Step,
    Target,
    Task,
    TrainingSpec,
)

TASK = Task(
    name="Herz-Risiko ä 心",
    data=DataContract(
        columns=[
            Column("age", minimum=0, maximum=120.5, fill=54.25),
            Column("ward", kind="category", values=["a", "b"]),
        ],
        target=Target(classes=["no", "yes"]),
    ),
    preprocessing=[Step("impute"), Step("clip", {"low": -5, "high": 5.0})],
    model=ModelSpec("mlp", {"hidden": [64, 32], "nested": {"deep": [None, True, "x", 0.1]}}),
    training=TrainingSpec(epochs=None, steps=10, learning_rate=1e-3),
    numeric=Numeric(threads=4),
)


def changed(path: str, value: Any, *, remove: bool = False) -> bytes:
    """The JSON of TASK with one value put at (or taken from) a dotted path."""
    plain = json.loads(canonical_json(TASK))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = plain
    for part in parents:
        place = place[part]
    if remove:
        del place[last]
    else:
        place[last] = value
    return json.dumps(plain).encode()


def test_a_task_comes_back_as_it_was() -> None:
    found = task_from_json(canonical_json(TASK))
    assert found == TASK
    assert found.digest == TASK.digest
    assert task_from_json(canonical_json(Task())) == Task()


def test_a_whole_number_in_place_of_a_float_keeps_the_digest() -> None:
    found = task_from_json(canonical_json(TASK))
    assert type(found.data.columns[0].minimum) is int
    assert found.digest == TASK.digest


def test_order_and_white_space_do_not_matter() -> None:
    plain = json.loads(canonical_json(TASK))
    loose = json.dumps(dict(reversed(plain.items())), indent=3).encode()
    assert task_from_json(loose).digest == TASK.digest


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", 3, "name: must be a text, not 3"),
        ("name", None, "name: must be a text, not None"),
        ("name", "\ud800", "name: .* is not a Unicode text"),
        ("numeric.threads", True, "numeric.threads: must be a whole number, not True"),
        ("numeric.threads", 1.0, "numeric.threads: must be a whole number, not 1.0"),
        ("numeric.threads", "1", "numeric.threads: must be a whole number"),
        ("numeric.threads", 0, "numeric.threads: must be at least 1, not 0"),
        ("numeric.threads", 10**6, "numeric.threads: must be at most 256"),
        ("numeric.deterministic", 1, "numeric.deterministic: must be true or false, not 1"),
        ("numeric.precision", "fp8", "numeric.precision: must be one of 'float32', 'bf16'"),
        ("numeric.precision", ["bf16"], "numeric.precision: must be one of .* not a list"),
        ("training.learning_rate", "fast", "training.learning_rate: must be a number"),
        ("training.learning_rate", False, "training.learning_rate: must be a number"),
        ("training.learning_rate", -1, "training.learning_rate: must be greater than 0"),
        ("training.learning_rate", None, "training.learning_rate: must be a number"),
        ("training.learning_rate", 2**60, "training.learning_rate: .* no double holds"),
        ("training.epochs", {}, "training.epochs: must be a whole number, not an object"),
        ("data.columns", {}, "data.columns: must be a list, not an object"),
        ("data.columns.1.kind", "word", r"data.columns\[1\].kind: must be one of"),
        ("data.columns.1.values.0", 7, r"data.columns\[1\].values\[0\]: must be a text"),
        ("data.columns.0", "age", r"data.columns\[0\]: must be an object, not 'age'"),
        ("data", None, "data: must be an object, not None"),
        ("data.surprise", 1, "data: unknown key 'surprise'"),
        ("model.arguments", [], "model.arguments: must be an object, not a list"),
        ("model.arguments.hidden", "\udc00", "model.arguments.hidden: .* not a Unicode text"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(path: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        task_from_json(changed(path, value))


@pytest.mark.parametrize("path", ["name", "numeric.threads", "data.target.classes"])
def test_a_missing_key_is_refused_even_if_it_has_a_default(path: str) -> None:
    with pytest.raises(ValueError, match=f"key '{path.rpartition('.')[2]}' is missing"):
        task_from_json(changed(path, None, remove=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"NaN", "NaN is not a number"),
        (b'{"a":-Infinity}', "-Infinity is not a number"),
        (b'{"a":1,"b":{"c":2,"c":2}}', "key 'c' is given twice"),
        (b"9" * 100_000, "beyond 64 bits"),
        (b"-9223372036854775809", "beyond 64 bits"),
        (b"[" * 1_000_000, "nested too deep"),
        (b'{"a":' * 1_000_000, "nested too deep"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strict_json(text)


def test_numbers_that_read_as_infinity_are_refused() -> None:
    for hostile in (b"1e999", b"-1e999"):
        text = canonical_json(TASK).replace(b'"learning_rate":0.001', b'"learning_rate":' + hostile)
        with pytest.raises(ValueError, match=r"training.learning_rate: .* beyond the range"):
            task_from_json(text)
        text = canonical_json(TASK).replace(b"[64,32]", b"[64," + hostile + b"]")
        with pytest.raises(ValueError, match=r"model.arguments.hidden\[1\]: .* beyond the range"):
            task_from_json(text)


def test_free_arguments_are_bounded_in_depth() -> None:
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    with pytest.raises(ValueError, match="nested deeper than"):
        task_from_json(changed("model.arguments.hidden", nested))


def test_messages_are_short_and_cannot_talk_to_a_terminal() -> None:
    for hostile in ("\x1b[2J" * 10_000, "\u202e" * 10_000):
        for text in (changed("numeric.precision", hostile), changed(hostile, 1)):
            with pytest.raises(ValueError) as caught:
                task_from_json(text)
            assert len(str(caught.value)) < 200
            assert str(caught.value).isascii()
            assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [int | str, set[int], dict[int, str], tuple[int, ...], object])
def test_a_type_that_cannot_be_decoded_is_the_callers_mistake(kind: Any) -> None:
    record = dataclass(type("Record", (), {"__annotations__": {"field": kind}}))
    with pytest.raises(TypeError, match="field: "):
        decode(record, {"field": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_either_decoded_or_refused_with_a_value_error(value: Any) -> None:
    try:
        task_from_json(json.dumps(value).encode())
    except ValueError:
        return
    pytest.fail("only a whole task is a task")


@given(st.binary(max_size=200), st.integers(min_value=0))
def test_a_damaged_task_is_a_task_or_a_value_error(damage: bytes, place: int) -> None:
    text = canonical_json(TASK)
    cut = place % len(text)
    try:
        found = task_from_json(text[:cut] + damage + text[cut + len(damage) :])
    except ValueError:
        return
    assert isinstance(found, Task)
    assert len(found.digest) == 64


@given(JSON.filter(lambda value: "nan" not in repr(value) and "inf" not in repr(value)))
def test_free_arguments_come_back_as_they_were(value: Any) -> None:
    task = Task(model=ModelSpec("mlp", {"given": value}))
    try:
        found = task_from_json(canonical_json(task))
    except ValueError as error:
        assert "64 bits" in str(error)  # noqa: PT017 - the one kind of value that is refused
        return
    assert found == task
    assert found.digest == task.digest

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from lepton_fed.core.layout import Layout, Rule, vector_digest

Entries = list[tuple[str, Rule, np.ndarray[Any, Any]]]


def entries() -> Entries:
    return [
        ("weight", "shared", np.arange(6, dtype=np.float32).reshape(2, 3)),
        ("steps", "local", np.array(7, dtype=np.int64)),
        ("scale", "shared", np.array(2.5, dtype=np.float32)),
        ("base", "frozen", np.ones((2, 2), dtype=np.float32)),
        ("bias", "shared", np.array([-1, -2, -3], dtype=np.float32)),
    ]


def layout() -> Layout:
    return Layout.of(entries())


def test_shared_tensors_lie_one_after_another_and_others_not_at_all() -> None:
    places = {entry.name: (entry.offset, entry.size) for entry in layout().entries}
    assert places == {
        "weight": (0, 6),
        "steps": (-1, 1),
        "scale": (6, 1),
        "base": (-1, 4),
        "bias": (7, 3),
    }
    assert layout().size == 10


def test_entries_of_a_rule_keep_the_order_of_the_model() -> None:
    assert [entry.name for entry in layout().of_rule("shared")] == ["weight", "scale", "bias"]
    assert [entry.name for entry in layout().of_rule("local")] == ["steps"]
    assert [entry.name for entry in layout().of_rule("frozen")] == ["base"]


def test_views_are_views() -> None:
    vector = np.arange(10, dtype=np.float32)
    views = layout().views(vector)
    assert {name: view.shape for name, view in views.items()} == {
        "weight": (2, 3),
        "scale": (),
        "bias": (3,),
    }
    assert all(np.shares_memory(view, vector) for view in views.values())
    views["weight"][1, 2] = 100
    vector[9] = 200
    assert vector[5] == 100
    assert views["bias"][2] == 200


def test_views_of_a_read_only_vector_are_read_only() -> None:
    vector = np.frombuffer(bytes(40), dtype=np.float32)
    with pytest.raises(ValueError, match="read-only"):
        layout().views(vector)["bias"][0] = 1


@pytest.mark.parametrize("shape", [(9,), (11,), (10, 1), (1, 10), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layout wants \(10,\)"):
        layout().views(np.zeros(shape, dtype=np.float32))


def test_gather_copies_and_leaves_its_input_alone() -> None:
    tensors = {name: value for name, _, value in entries()}
    vector = layout().gather(tensors)
    assert vector.dtype == np.float32
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 2.5, -1, -2, -3]
    vector[:] = 9
    assert tensors["weight"][0, 1] == 1


def test_gather_reads_each_tensor_once() -> None:
    read: list[str] = []

    class Recording(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.append(key)
            return super().get(key, default)

    layout().gather(Recording((name, value) for name, _, value in entries()))
    assert read == ["weight", "scale", "bias"]


def test_gather_takes_any_memory_order() -> None:
    tensors = {name: np.asarray(value, order="F") for name, _, value in entries()}
    assert layout().gather(tensors).tolist()[:6] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("weight", np.zeros((3, 2), np.float32), r"\(3, 2\), not float32 \(2, 3\)"),
        ("weight", np.zeros(6, np.float32), r"\(6,\), not"),
        ("bias", np.zeros((1,), np.float32), r"\(1,\), not"),
        ("bias", np.zeros((3, 1), np.float32), r"\(3, 1\), not"),
        ("scale", np.zeros((1,), np.float32), r"\(1,\), not"),
        ("bias", np.zeros(3, np.float64), "float64"),
        ("bias", np.zeros(3, np.int64), "int64"),
    ],
)
def test_gather_neither_broadcasts_nor_converts(name: str, value: Any, what: str) -> None:
    tensors = {n: v for n, _, v in entries()} | {name: value}
    with pytest.raises(ValueError, match=f"tensor '{name}' is .*{what}"):
        layout().gather(tensors)


def test_gather_names_a_missing_tensor() -> None:
    tensors = {name: value for name, _, value in entries() if name != "bias"}
    with pytest.raises(ValueError, match="'bias' is missing"):
        layout().gather(tensors)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.bool_])
def test_a_shared_tensor_of_another_type_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="shared tensors are float32"):
        Layout.of([("count", "shared", np.zeros(2, dtype=dtype))])


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'steps' occurs twice"):
        Layout.of([*entries(), ("steps", "shared", np.zeros(1, np.float32))])


def test_an_integer_buffer_keeps_its_type_and_stays_out_of_the_vector() -> None:
    (steps,) = layout().of_rule("local")
    assert (steps.dtype, steps.shape, steps.offset) == ("int64", (), -1)


def test_the_content_of_a_frozen_tensor_is_in_the_digest() -> None:
    other = [(n, r, np.zeros((2, 2), np.float32) if n == "base" else v) for n, r, v in entries()]
    assert Layout.of(other).digest != layout().digest
    content = {entry.name: entry.content for entry in layout().entries}
    assert content["base"] == hashlib.sha256(np.ones(4, dtype="<f4").tobytes()).hexdigest()
    assert content["weight"] == content["steps"] == ""


def test_the_content_of_a_frozen_tensor_does_not_depend_on_its_memory_order() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = Layout.of([("base", "frozen", value)])
    assert Layout.of([("base", "frozen", np.asfortranarray(value))]) == one


def test_the_bytes_of_a_type_that_numpy_lacks_are_named_by_it() -> None:
    value = np.array([[1, 2]], dtype=np.int16)
    (entry,) = Layout.of([("base", "frozen", value)], {"base": "bfloat16"}).entries
    assert (entry.dtype, entry.shape) == ("bfloat16", (1, 2))
    assert entry.content == hashlib.sha256(value.tobytes()).hexdigest()
    assert entry != Layout.of([("base", "frozen", value)]).entries[0]


@pytest.mark.parametrize("rule", ["shared", "local"])
def test_only_a_frozen_tensor_is_of_such_a_type(rule: Rule) -> None:
    with pytest.raises(ValueError, match="'base' is bfloat16"):
        Layout.of([("base", rule, np.zeros(2, np.float32))], {"base": "bfloat16"})


def test_the_values_of_shared_and_local_tensors_are_not_in_the_digest() -> None:
    other = [(n, r, v if r == "frozen" else v + v.dtype.type(1)) for n, r, v in entries()]
    assert Layout.of(other).digest == layout().digest


@pytest.mark.parametrize(
    "change",
    [
        ("weight2", "shared", np.zeros((2, 3), np.float32)),
        ("weight", "local", np.zeros((2, 3), np.float32)),
        ("weight", "shared", np.zeros((3, 2), np.float32)),
        ("weight", "local", np.zeros((2, 3), np.float64)),
    ],
)
def test_name_rule_shape_and_type_are_in_the_digest(change: Any) -> None:
    found = {Layout.of([change, *entries()[1:]]).digest, layout().digest}
    found.add(Layout.of([*entries()[1:], change]).digest)
    assert len(found) == 3


def test_the_digest_of_a_model_is_over_layout_and_every_bit() -> None:
    vector = np.zeros(10, dtype=np.float32)
    digest = vector_digest(layout(), vector)
    assert vector_digest(layout(), vector.copy()) == digest
    assert vector_digest(layout(), vector.astype(">f4")) == digest
    vector[4] = -0.0
    assert vector_digest(layout(), vector) != digest
    other = Layout.of([("flat", "shared", np.zeros(10, np.float32))])
    assert vector_digest(other, np.zeros(10, np.float32)) != digest

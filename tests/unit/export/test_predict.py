from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.core.task import Target
from lepton_fed.errors import TaskError
from lepton_fed.export.bundle import VerifiedBundle
from lepton_fed.export.predict import (
    ClassPredictions,
    NumberPredictions,
    check_output,
    predict,
    write_predictions,
)
from lepton_fed.export.release import ExportReport
from lepton_fed.identity.signature import VerifiedBytes


def bundle_of(exported: ExportReport, case: Any) -> VerifiedBundle:
    """A verified bundle of another model: what predict looks at, without writing a folder."""
    files = {"model.onnx": VerifiedBytes(case.onnx)}
    return replace(exported.bundle, task=case.task, files=files)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def reference_softmax(logits: Any) -> Any:
    exact = np.exp(logits.astype(np.longdouble))
    return exact / exact.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_classes_are_those_of_torch(
    request: pytest.FixtureRequest, exported: ExportReport, name: str, batch_size: int
) -> None:
    case = request.getfixturevalue(name)
    rows = np.resize(case.examples, (10, *case.examples.shape[1:]))
    found = predict(bundle_of(exported, case), rows, batch_size)
    assert isinstance(found, ClassPredictions)
    logits = case.torch(rows)
    assert len(found) == 10
    assert found.classes == case.task.data.target.classes
    assert np.array_equal(found.codes, logits.argmax(axis=1))
    assert found.probabilities.dtype == np.float32
    assert np.allclose(found.probabilities, reference_softmax(logits), atol=1e-6)


def test_numbers_are_those_of_torch(exported: ExportReport, regressor: Any) -> None:
    found = predict(bundle_of(exported, regressor), regressor.examples, 7)
    assert isinstance(found, NumberPredictions)
    assert found.values.shape == (40,)
    assert np.allclose(found.values, regressor.torch(regressor.examples)[:, 0], atol=1e-5)


def test_threads_do_not_change_the_answer(exported: ExportReport, mlp: Any) -> None:
    one = predict(exported.bundle, mlp.examples, threads=1)
    two = predict(exported.bundle, mlp.examples, threads=2)
    assert isinstance(one, ClassPredictions)
    assert isinstance(two, ClassPredictions)
    assert np.allclose(one.probabilities, two.probabilities, atol=1e-6)


def test_huge_logits_do_not_overflow(exported: ExportReport, mlp: Any) -> None:
    rows = mlp.examples * np.float32(1e6)
    found = predict(exported.bundle, rows)
    assert isinstance(found, ClassPredictions)
    assert np.isfinite(found.probabilities).all()
    assert np.allclose(found.probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("name", ["mlp", "regressor"])
def test_no_rows_give_no_predictions(
    request: pytest.FixtureRequest, exported: ExportReport, tmp_path: Path, name: str
) -> None:
    case = request.getfixturevalue(name)
    found = predict(bundle_of(exported, case), case.examples[:0])
    assert len(found) == 0
    write_predictions(found, tmp_path / "p.csv")
    assert len(rows_of(tmp_path / "p.csv")) == 1


def test_a_row_without_an_answer_is_named(exported: ExportReport, mlp: Any) -> None:
    rows = mlp.examples.copy()
    rows[2, 0] = np.inf
    rows[4, 2] = np.nan
    rows[4, 0] = -np.inf
    with pytest.raises(TaskError, match=r"2 of 5 rows \(row 3, 5\)") as caught:
        predict(exported.bundle, rows)
    assert caught.value.code == "LF3221"


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((2, 4), np.float32),
        np.zeros((2, 3), np.float64),
        np.zeros((3,), np.float32),
        np.zeros((2, 3), np.uint8),
    ],
)
def test_inputs_of_another_shape_are_the_callers_mistake(
    exported: ExportReport, inputs: Any
) -> None:
    with pytest.raises(ValueError, match="the contract says float32"):
        predict(exported.bundle, inputs)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_the_callers_mistake(exported: ExportReport, batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be positive"):
        predict(exported.bundle, np.zeros((1, 3), np.float32), batch_size)


def classes(names: list[str]) -> ClassPredictions:
    probabilities = np.zeros((2, len(names)), np.float32)
    probabilities[0, 0] = 1
    probabilities[1, -1] = 0.1
    return ClassPredictions(names, np.array([0, len(names) - 1]), probabilities)


def test_the_table_of_classes(tmp_path: Path) -> None:
    write_predictions(classes(["no", "maybe", "yes"]), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_bytes() == (
        b"row,class,probability,probability_no,probability_maybe,probability_yes\n"
        b"1,no,1.0,1.0,0.0,0.0\n"
        b"2,yes,0.1,0.0,0.0,0.1\n"
    )


def test_the_table_of_numbers(tmp_path: Path) -> None:
    values = np.array([1.5, -0.1, 1e-8, 3e20], np.float32)
    write_predictions(NumberPredictions(values), tmp_path / "p.csv")
    table = rows_of(tmp_path / "p.csv")
    assert table[0] == ["row", "value"]
    assert [row[0] for row in table[1:]] == ["1", "2", "3", "4"]
    assert np.array_equal(np.array([row[1] for row in table[1:]], dtype=np.float32), values)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("-1", "-1"),
        ("+1.5e3", "+1.5e3"),
        ("a=b", "a=b"),
        ('a,"b"\nc', 'a,"b"\nc'),
        ("", ""),
    ],
)
def test_a_class_name_cannot_become_a_formula(tmp_path: Path, name: str, cell: str) -> None:
    write_predictions(classes([name, "other"]), tmp_path / "p.csv")
    table = rows_of(tmp_path / "p.csv")
    assert table[1][1] == cell
    assert table[0][3] == f"probability_{name}"


def test_an_older_file_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.csv"
    path.write_text("older")

    def full(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    for step in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(step, full)
            with pytest.raises(TaskError, match=r"LF3222.*No space left"):
                write_predictions(classes(["a", "b"]), path)
        assert path.read_text() == "older"
    write_predictions(classes(["a", "b"]), path)
    assert path.read_text().startswith("row,class")
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.csv"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="LF3222"):
        write_predictions(classes(["a", "b"]), tmp_path / "none" / "p.csv")


def outcome(action: Callable[[], object]) -> str:
    with pytest.raises(TaskError) as caught:
        action()
    (problem,) = caught.value.problems
    assert problem.remedy
    return f"{problem.code} {problem.where}"


def test_no_name_at_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(lambda: write_predictions(classes(["a", "b"]), Path(""))) == "LF3222 ."
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 300)
    assert outcome(lambda: write_predictions(classes(["a", "b"]), path)) == f"LF3222 {path}"


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "folder", "device", "loop"):
        path = tmp_path / name
        before = path.lstat()
        assert outcome(lambda path=path: write_predictions(classes(["a", "b"]), path)) == (  # type: ignore[misc]
            f"LF3222 {path}"
        )
        assert path.lstat() == before
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("older")
    (tmp_path / "link.csv").symlink_to("file.csv")
    write_predictions(classes(["a", "b"]), tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "file.csv").read_text().startswith("row,class")


def test_what_was_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle, rows = Path("bundle"), Path("rows.csv")
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    rows.write_text("x")
    Path("link").symlink_to(bundle)
    for name in ("rows.csv", f"{tmp_path}/bundle/../rows.csv", "link/new.csv", "bundle/new.csv",
                 "bundle/manifest.json"):  # fmt: skip
        assert outcome(lambda name=name: check_output(Path(name), (bundle, rows))) == (  # type: ignore[misc]
            f"LF3222 {Path(name)}"
        )
    assert check_output(Path("bundle.csv"), (bundle, rows)) == tmp_path / "bundle.csv"


def test_two_classes_have_two_probabilities(exported: ExportReport, mlp: Any) -> None:
    target = Target(classes=["a", "b", "c"])
    task = replace(mlp.task, data=replace(mlp.task.data, target=target))
    found = predict(replace(exported.bundle, task=task), mlp.examples)
    assert isinstance(found, ClassPredictions)
    assert found.probabilities.shape == (5, 3)

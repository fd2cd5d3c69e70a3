from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import lepton_fed.export.release as release_module
from lepton_fed.core.task import ModelSpec
from lepton_fed.errors import TaskError
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.release import ExportReport, export_model
from lepton_fed.identity.signature import PrivateKey, fingerprint

KEY = PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def call(
    mlp: Any, summary_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The arguments of an export; tracing is answered from the export made once."""
    monkeypatch.setattr(release_module, "export_onnx", lambda *_: mlp.onnx)
    return {
        "task": mlp.task,
        "summary": summary_of(mlp.task),
        "module": mlp.module,
        "weights": mlp.weights,
        "examples": mlp.examples,
        "private_key": KEY,
        "folder": tmp_path / "bundle",
        "version": 1,
    }


def codes_of(call: dict[str, Any]) -> list[str]:
    with pytest.raises(TaskError) as caught:
        export_model(**call)
    assert not call["folder"].exists()
    assert all(problem.remedy for problem in caught.value.problems)
    return [problem.code for problem in caught.value.problems]


def test_an_export_ends_in_a_bundle_that_verifies(exported: ExportReport, mlp: Any) -> None:
    bundle = verify_bundle(exported.bundle.folder, KEY.public_key())
    assert bundle == exported.bundle
    assert exported.signer == bundle.manifest.signer == fingerprint(KEY.public_key())
    assert exported.parity == bundle.manifest.parity
    assert exported.parity.inputs == "5 real rows in turn"
    sizes = [(bundle.folder / name).stat().st_size for name in bundle.manifest.files]
    assert exported.size_bytes == sum(sizes)
    assert list(exported.seconds) == ["export", "parity", "card", "write"]
    assert all(seconds >= 0 for seconds in exported.seconds.values())
    assert bundle.card.startswith("# Model card: wards\n")
    assert exported.signer in bundle.card


def test_the_libraries_of_the_export_are_recorded(exported: ExportReport) -> None:
    found = exported.bundle.manifest.exported_with
    assert {"lepton-fed", "onnx", "onnxruntime", "python", "torch"} <= set(found)
    assert all(version[0].isdigit() for version in found.values())


def test_no_row_of_the_examples_is_in_the_bundle(exported: ExportReport, mlp: Any) -> None:
    row = mlp.examples[1].tobytes()
    for path in exported.bundle.folder.iterdir():
        assert row not in path.read_bytes()


def test_times_are_written_in_utc(call: dict[str, Any]) -> None:
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    report = export_model(**call, created=created)
    assert report.bundle.manifest.created == "2026-01-02T01:04:05Z"


def test_the_time_is_now_by_default(call: dict[str, Any]) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    created = datetime.fromisoformat(export_model(**call).bundle.manifest.created)
    assert before <= created <= datetime.now(UTC)


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_counts_from_one(call: dict[str, Any], version: int) -> None:
    assert codes_of({**call, "version": version}) == ["LF3212"]


def test_a_summary_of_another_task_is_refused(call: dict[str, Any]) -> None:
    other = replace(call["task"], name="another")
    assert codes_of({**call, "task": other}) == ["LF3213"]


def test_a_task_that_could_not_be_read_back_is_refused_before_the_export(
    call: dict[str, Any], summary_of: Any
) -> None:
    task = replace(call["task"], model=ModelSpec("mlp", {"seed": 2**70}))
    found = codes_of({**call, "task": task, "summary": summary_of(task)})
    assert found == ["LF3213"]


def test_weights_that_are_not_the_modules_are_refused(call: dict[str, Any]) -> None:
    weights = call["weights"]
    name = next(iter(weights))
    for wrong in (
        {},
        {**weights, "other": np.zeros(1, np.float32)},
        {**weights, name: weights[name] + np.float32(1e-6)},
        {**weights, name: weights[name].astype(np.float64)},
        {**weights, name: weights[name][None]},
    ):
        assert codes_of({**call, "weights": wrong}) == ["LF3214"]


def test_weights_are_found_in_whichever_part_of_the_module_has_them(
    regressor: Any, summary_of: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_module, "export_onnx", lambda *_: regressor.onnx)
    call |= {
        "task": regressor.task,
        "summary": summary_of(regressor.task),
        "module": nn.Sequential(*regressor.module, nn.Flatten(0)).eval(),
        "examples": regressor.examples,
        "weights": regressor.weights,
    }
    bundle = export_model(**call).bundle
    assert sorted(bundle.weights()) == ["0.bias", "0.weight"]


def test_everything_wrong_with_the_inputs_is_said_at_once(call: dict[str, Any]) -> None:
    other = replace(call["task"], name="another")
    assert codes_of({**call, "task": other, "version": 0, "weights": {}}) == [
        "LF3212",
        "LF3213",
        "LF3214",
    ]


def test_an_existing_folder_is_refused_before_the_export(
    call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_module, "export_onnx", None)
    call["folder"].mkdir()
    (call["folder"] / "mine").touch()
    with pytest.raises(TaskError, match="LF3208"):
        export_model(**call)
    assert [path.name for path in call["folder"].iterdir()] == ["mine"]


def test_a_wrong_translation_writes_nothing(
    call: dict[str, Any], cnn: Any, mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mlp.weights["0.bias"].tobytes()
    assert mlp.onnx.count(first) == 1
    changed = mlp.onnx.replace(first, (mlp.weights["0.bias"] + np.float32(0.5)).tobytes())
    monkeypatch.setattr(release_module, "export_onnx", lambda *_: changed)
    assert set(codes_of(call)) == {"LF3207"}
    assert list(call["folder"].parent.iterdir()) == []

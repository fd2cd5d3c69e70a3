"""The whole line as a user walks it: real processes, real files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

COLUMNS = ["radius", "texture", "perimeter", "area", "smoothness"]


def lepton(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "lepton_fed", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def write_hospital(path: Path) -> None:
    """A hospital's table: a few columns of breast cancer, some cells missing, one extra column."""
    data = load_breast_cancer()
    generator = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["patient", *COLUMNS, "ward", "diagnosis"])
        for number, (values, target) in enumerate(zip(data.data, data.target, strict=True)):
            cells = [f"{value:.4f}" for value in values[: len(COLUMNS)]]
            if generator.random() < 0.05:
                cells[1] = "NA"
            ward = ("a", "b", "c")[number % 3]
            rows.writerow([f"p{number}", *cells, ward, data.target_names[target]])


def write_conf(path: Path) -> None:
    data = load_breast_cancer()
    mean, std = data.data.mean(axis=0), data.data.std(axis=0)
    columns = "\n".join(
        f"      - {{name: {name}, mean: {mean[i]:.3f}, std: {std[i]:.3f}, fill: {mean[i]:.3f}}}"
        for i, name in enumerate(COLUMNS)
    )
    path.write_text(
        f"""
kind: simulation
task:
  name: tumour
  data:
    kind: table
    columns:
{columns}
      - {{name: ward, kind: category, values: [a, b, c]}}
    target: {{name: diagnosis, classes: [malignant, benign]}}
  preprocessing:
    - {{step: impute}}
    - {{step: standardise}}
    - {{step: one_hot}}
  model: {{name: mlp, arguments: {{hidden: [16]}}}}
  training: {{epochs: 3, batch_size: 16, learning_rate: 0.1}}
  metrics: [accuracy, auc]
rounds: {{count: 6, quorum: 3}}
sites:
  count: 3
  source: {{reader: csv, path: hospital.csv}}
  partition: {{name: column, arguments: {{column: ward}}}}
"""
    )


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    lepton("init", cwd=folder)
    write_hospital(folder / "hospital.csv")
    write_conf(folder / "tumour.yaml")
    lepton("check", "--conf", "tumour.yaml", cwd=folder)
    summary = json.loads(lepton("simulate", "--conf", "tumour.yaml", "--json", cwd=folder).stdout)
    assert summary["metrics"]["accuracy"] > 0.85
    assert summary["metrics"]["auc"] > 0.9
    assert summary["error_bounds"]["auc"] < 0.01
    lepton("export", "last", cwd=folder)
    return folder


def bundle_of(folder: Path) -> Path:
    return next(folder.glob("runs/*/bundle"))


def test_a_users_own_table_is_predicted_by_the_verified_bundle(walked: Path) -> None:
    done = lepton(
        "predict", "--bundle", str(bundle_of(walked)), "--input", "hospital.csv", cwd=walked
    )
    assert "569 rows" in done.stdout
    with (walked / "hospital.csv").open() as file:
        truth = [row["diagnosis"] for row in csv.DictReader(file)]
    with (walked / "predictions.csv").open() as file:
        predicted = [row["class"] for row in csv.DictReader(file)]
    assert np.mean([a == b for a, b in zip(truth, predicted, strict=True)]) > 0.85


def test_a_table_with_a_wrong_cell_is_refused_by_row_and_column(walked: Path) -> None:
    text = (walked / "hospital.csv").read_text().splitlines()
    cells = text[7].split(",")
    text[7] = ",".join([*cells[:2], "tall", *cells[3:]])
    (walked / "wrong.csv").write_text("\n".join(text))
    words = ("predict", "--bundle", str(bundle_of(walked)), "--input", "wrong.csv")
    done = lepton(*words, "--output", "none.csv", cwd=walked, code=3)
    assert "wrong.csv" in done.stderr
    assert "8" in done.stderr
    assert "texture" in done.stderr
    assert not (walked / "none.csv").exists()


def test_a_bundle_with_one_changed_byte_is_refused(walked: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "manifest.json", "task.json", "card.md", "model.safetensors"):
        copy = tmp_path / name
        copy.mkdir()
        for file in bundle_of(walked).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 3] ^= 4
        (copy / name).write_bytes(content)
        words = ("predict", "--bundle", str(copy), "--input", "hospital.csv")
        done = lepton(*words, "--output", "none.csv", cwd=walked, code=4)
        assert "LF41" in done.stderr
    assert not (walked / "none.csv").exists()


def test_a_bundle_of_another_coordinator_is_refused(walked: Path, tmp_path: Path) -> None:
    lepton("init", "other", cwd=tmp_path)
    other = tmp_path / "other" / "keys" / "coordinator.pub"
    lepton(
        "predict", "--bundle", str(bundle_of(walked)), "--input", "hospital.csv",
        "--key", str(other), "--output", "none.csv", cwd=walked, code=4,
    )  # fmt: skip
    assert not (walked / "none.csv").exists()


def test_the_demo_does_the_whole_line(tmp_path: Path) -> None:
    told = json.loads(lepton("demo", "--json", cwd=tmp_path).stdout)
    first, second = told["digests_without_dp"]
    assert first == second
    assert "LF4112" in told["tampered"]
    assert set(told["sites"]) == {"north", "east", "south"}
    for site in told["sites"].values():
        assert site["correct"] > 0.88  # the DP noise is drawn anew each time
        assert site["version"] == 1  # in use at the site, after the push
        assert site["bytes_sent"] > 20 * 4 * told["summary"]["parameters"]
    assert [site["name"] for site in told["summary"]["sites"]] == ["east", "north", "south"]
    for site in told["summary"]["sites"]:
        assert 7.9 < site["epsilon"] <= 8.0
    for each in told["comparison"]:
        assert each["federated_all"]["accuracy"] > each["alone_all"]["accuracy"]
    assert Path(tmp_path / told["bundle"] / "manifest.sig").is_file()

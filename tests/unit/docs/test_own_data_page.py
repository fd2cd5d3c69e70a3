"""docs/how-to/own-data.md: its table is made, its commands run, its model worth something."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app

PAGE = "how-to/own-data.md"


@pytest.fixture(scope="module")
def walked(opened):
    opened.run()
    return opened.folder


def column(path, name):
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_the_commands_print_what_the_page_says(walked):
    truth, predicted = (
        column(walked / "patients.csv", "readmitted"),
        column(walked / "predictions.csv", "class"),
    )
    assert np.mean([a == b for a, b in zip(truth, predicted, strict=True)]) > 0.8


def test_another_run_has_the_same_digest_as_the_page_says(walked):
    first = json.loads(sorted(walked.glob("runs/*/summary.json"))[0].read_text())
    assert first["repeatable"]
    again = CliRunner().invoke(app, ["simulate", "--conf", "patients.yaml", "--json"])
    assert json.loads(again.stdout)["digest"] == first["digest"]


@pytest.mark.parametrize(
    "override",
    [
        "privacy={record: {enabled: true, epsilon: 4}, outside_epsilon: [evaluation]}",
        "sites.partition={name: column, arguments: {column: ward}}",
        'sites.source.arguments={delimiter: ;, missing: ["", "-"]}',
    ],
    ids=["privacy", "a site a ward", "another delimiter"],
)
def test_the_other_settings_of_the_page_pass_their_check(walked, override):
    if "delimiter" in override:
        table = (walked / "patients.csv").read_text().replace(",", ";").replace(";;", ";-;")
        (walked / "patients.csv").write_text(table)
    result = CliRunner().invoke(app, ["check", "--conf", "patients.yaml", override])
    assert result.exit_code == 0, result.output


def test_a_number_is_predicted_with_the_settings_of_the_page(walked):
    words = [
        "task.data.target={kind: number, name: pressure}",
        "task.data.columns=[{name: age, mean: 60, std: 15}]",
        "task.preprocessing=[{step: standardise}]",
        "task.metrics=[mae, r2]",
        "sites.source.arguments={delimiter: ;}",
    ]
    result = CliRunner().invoke(app, ["check", "--conf", "patients.yaml", *words])
    assert result.exit_code == 0, result.output

"""`lepton-fed privacy plan`: from options and confs to numbers, or one clear screen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lepton_fed.cli import app
from lepton_fed.config.templates import template
from lepton_fed.privacy.dp.accounting import (
    CorrelatedGaussian,
    OrderedGaussian,
    SampledGaussian,
    epsilon_of,
)

SMALL = ("rounds.count=5", "task.training.batch_size=40", "privacy.record.epsilon=4")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["privacy", "plan", *words], env={"COLUMNS": "110"})


def plan(*words: str) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_plan_without_a_conf_file_is_made_of_the_command_line() -> None:
    found = plan("--rows", "200", *SMALL, "task.training.epochs=2")
    schedule = found["schedule"]
    assert (found["rows"], found["rounds"]) == (200, 5)
    assert (schedule["batch_size"], schedule["sampling_rate"], schedule["steps"]) == (40, 0.2, 10)
    event = SampledGaussian(schedule["noise_multiplier"], 0.2, 50)
    assert found["guarantee"]["epsilon"] == epsilon_of([event], 1e-5)
    assert 3.96 < found["guarantee"]["epsilon"] <= 4
    assert found["guarantee"]["adjacency"] == "add-or-remove-one"
    assert schedule["step_noise_to_signal"] == schedule["noise_multiplier"] / 40
    assert [point["round"] for point in found["curve"]] == [1, 2, 5]
    assert found["curve"][-1]["epsilon"] == found["guarantee"]["epsilon"]


def test_steps_and_orders_are_planned_as_they_are_run() -> None:
    words = ("task.training.epochs=null", "task.training.steps=7", "privacy.record.sampler=full")
    found = plan("--rows", "200", *SMALL, *words)
    assert (found["schedule"]["steps"], found["schedule"]["sampler"]) == (7, "full")
    # Five steps are a pass, so seven are two.
    event = OrderedGaussian(found["schedule"]["noise_multiplier"], 0.2, 35, 10, "full")
    assert found["guarantee"]["epsilon"] == epsilon_of([event], 1e-5)
    assert found["guarantee"]["adjacency"] == "zero-out-one"


def test_correlated_noise_is_planned_and_held_against_fresh_noise() -> None:
    longer = ("rounds.count=20", "task.training.epochs=1", "privacy.record.sampler=full")
    words = ("privacy.record.mechanism=dp_ftrl", *longer)
    found = plan("--rows", "200", *SMALL, *words)
    schedule, told = found["schedule"], found["correlation"]
    assert (schedule["mechanism"], schedule["sampler"]) == ("dp_ftrl", "full")
    assert (told["participations"], told["separation"]) == (20, 5)
    event = CorrelatedGaussian(schedule["noise_multiplier"], 0.2, 100, 0, 100, 5, told["band"])
    assert found["guarantee"]["epsilon"] == epsilon_of([event], 1e-5)
    assert found["guarantee"]["adjacency"] == "zero-out-one"
    # At the same epsilon; 20 of 100 steps have the record in them.
    fresh = plan("--rows", "200", *SMALL, *longer)
    assert fresh["correlation"] is None
    alike = fresh["schedule"]["noise_multiplier"] * math.sqrt(101 / 2)
    assert told["independent_prefix_error"] == pytest.approx(alike, rel=2e-3)
    assert told["prefix_error"] < 0.6 * told["independent_prefix_error"]
    assert told["step_deviation"] > fresh["schedule"]["noise_multiplier"]
    assert schedule["run_noise_to_signal"] < 0.6 * fresh["schedule"]["run_noise_to_signal"]
    assert schedule["step_noise_to_signal"] == told["step_deviation"] / 40
    assert found["better"] == []
    few = plan("--rows", "200", *SMALL, *words, "privacy.record.band=2")["correlation"]
    assert few["band"] == 2
    assert few["state_bytes"] * (told["band"] - 1) == told["state_bytes"]
    shown = run("--rows", "200", *SMALL, *words).output
    assert f"correlated over {told['band']} steps" in shown
    assert "with fresh noise at the same epsilon" in shown


def test_more_correlated_steps_than_can_be_planned_are_refused() -> None:
    words = ("privacy.record.mechanism=dp_ftrl", "privacy.record.sampler=full")
    refused = run("--rows", "200", *SMALL, *words, "rounds.count=100000")
    assert refused.exit_code == 2
    assert "LF3308" in refused.output


def test_a_coordinator_s_conf_gives_the_values_and_the_command_line_replaces_them() -> None:
    values = template("server")
    values["rounds"]["count"] = 3
    Path("server.yaml").write_text(yaml.safe_dump(values))
    assert plan("--conf", "server.yaml", "--rows", "300")["rounds"] == 3
    assert plan("--conf", "server.yaml", "--rows", "300", "rounds.count=2")["rounds"] == 2


def test_a_simulation_is_planned_for_its_smallest_site() -> None:
    assert plan(*SMALL)["rows"] == 422, "of 422, 452 and 563"
    assert plan(*SMALL, "--rows", "50")["rows"] == 50


def test_the_screen_shows_noise_cost_and_a_better_schedule() -> None:
    result = run("--rows", "144", "task.training.batch_size=8")
    assert result.exit_code == 0, result.output
    for said in ("noise", "replace-one", "Rényi", "as it is", "better", "round 20", "next: "):
        assert said in result.stdout
    words = result.stdout.split("next: ")[1].split()
    assert plan("--rows", "144", *words)["better"] == [], "what is offered is as good as it gets"


@pytest.mark.parametrize(
    ("words", "code", "exit_code"),
    [
        (("--rows", "100", "privacy.record.delta=0.05"), "LF3307", 2),
        (("--rows", "1000", "privacy.record.epsilon=0.00001"), "LF3301", 2),
        (("--rows", "1000", "rounds.count=9999", "task.training.epochs=100"), "LF3308", 2),
        (("--rows", "100", "rounds.cuont=3"), "LF1", 2),
        (("--conf", "client.yaml"), "LF1211", 2),
        (("--conf", "server.yaml"), "LF1212", 2),
    ],
)
def test_what_cannot_be_planned_is_said_on_one_screen(
    words: tuple[str, ...], code: str, exit_code: int
) -> None:
    for kind in ("client", "server"):
        Path(f"{kind}.yaml").write_text(yaml.safe_dump(template(kind)))
    result = run(*words)
    assert result.exit_code == exit_code, result.output
    assert f"[{code}" in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout


def test_no_rows_at_all_are_refused_by_the_command_line() -> None:
    assert run("--rows", "0").exit_code == 2

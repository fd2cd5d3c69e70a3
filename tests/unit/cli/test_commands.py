from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lepton_fed.cli import app

SMALL = (
    "rounds.count=2",
    "task.model={name: linear}",
    "privacy.record.enabled=false",
)
COMMANDS = ("init", "check", "config", "simulate", "export", "predict", "runs", "demo")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert run("init").exit_code == 0
    return tmp_path


def test_help_imports_no_framework() -> None:
    program = (
        "import sys; sys.argv = ['lepton-fed', '--help']\n"
        "from lepton_fed.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'flwr', 'opacus', 'sklearn', 'onnx', 'onnxruntime', 'numpy', 'scipy',"
        " 'omegaconf', 'dp_accounting', 'cryptography'}\n"
        "sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version_is_printed() -> None:
    assert run("--version").output.startswith("lepton-fed ")


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run("simulat").exit_code == 2


def test_init_overwrites_nothing(project: Path) -> None:
    conf = project / "conf" / "simulation.yaml"
    conf.write_text("mine")
    (project / "conf" / "server.yaml").unlink()
    result = run("init")
    assert result.exit_code == 2
    assert "LF1201" in result.stderr
    assert conf.read_text() == "mine"
    assert not (project / "conf" / "server.yaml").exists()


def test_init_makes_a_private_key_that_only_its_owner_reads(project: Path) -> None:
    assert (project / "keys" / "coordinator.pem").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["simulation", "server", "client"])
def test_the_shipped_confs_pass_their_check(project: Path, kind: str) -> None:
    result = run("check", "--conf", f"conf/{kind}.yaml", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"]
    assert all(item["ok"] if "ok" in item else not item["problems"] for item in report["checks"])


def test_check_reports_every_failure_with_its_place(project: Path) -> None:
    result = run("check", "device=cuda:63", "privacy.record.epsilon=0.0001", "sites.count=3")
    assert result.exit_code == 2
    assert "command line: device=cuda:63" in result.stderr
    assert "command line: privacy.record.epsilon=0.0001" in result.stderr
    assert "2 problems" in result.stderr


def test_check_finds_a_wrong_argument_of_a_plug_in(project: Path) -> None:
    result = run("check", "task.model.arguments.hiden=[8]")
    assert result.exit_code == 2
    assert "did you mean `hidden`?" in result.stderr


def test_a_client_conf_whose_data_does_not_fit_exits_with_3(project: Path) -> None:
    result = run("check", "--conf", "conf/client.yaml", "source.reader=csv", "source.path=no.csv")
    assert result.exit_code == 3


def test_simulate_with_a_wrong_conf_starts_nothing(project: Path) -> None:
    result = run("simulate", "rounds.count=0", "task.training.bach_size=3", *SMALL[1:])
    assert result.exit_code == 2
    assert "bach_size" in result.stderr
    assert "rounds.count" in result.stderr
    assert not (project / "runs").exists()


def test_errors_come_as_json_too(project: Path) -> None:
    result = run("simulate", "rounds.count=0", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["problems"][0]["key"] == "rounds.count"


def test_simulate_logs_one_json_line_an_event_when_not_on_a_terminal(project: Path) -> None:
    result = run("simulate", *SMALL)
    assert result.exit_code == 0, result.output
    events = [json.loads(line)["event"] for line in result.stderr.splitlines()]
    assert events[0] == "run.started"
    assert events[-1] == "run.finished"
    assert events.count("round.closed") == 2
    assert "run digest" in result.stdout


def test_two_runs_without_dp_print_the_same_digest(project: Path) -> None:
    digests = {json.loads(run("simulate", *SMALL, "--json").stdout)["digest"] for _ in range(2)}
    assert len(digests) == 1
    listed = json.loads(run("runs", "list", "--json").stdout)
    assert [row["digest"] for row in listed] == [*digests, *digests]


def test_runs_show_finds_a_changed_event_log(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    assert run("runs", "show", "last").exit_code == 0
    log = next(project.glob("runs/*/events.jsonl"))
    log.write_text(log.read_text().replace('"accuracy"', '"acuracy"', 1))
    result = run("runs", "show", "last")
    assert result.exit_code == 4
    assert "events.jsonl:" in result.stderr


def test_runs_show_finds_an_event_log_that_was_cut_short(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    log = next(project.glob("runs/*/events.jsonl"))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    result = run("runs", "show", "last")
    assert result.exit_code == 4
    assert "LF4302" in result.stderr


def test_runs_show_of_nothing_says_what_there_is(project: Path) -> None:
    result = run("runs", "show", "abcd")
    assert result.exit_code == 5
    assert "lepton-fed simulate" in result.stderr


def test_explain_says_where_a_value_comes_from(project: Path) -> None:
    words = ("config", "explain", "privacy.record.epsilon")
    assert "conf/simulation.yaml:" in run(*words).stdout
    assert "command line" in run(*words, "privacy.record.epsilon=3").stdout
    explained = json.loads(run(*words, "--json").stdout)
    assert explained["default"] == "8.0"


def test_explain_works_without_a_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "default" in run("config", "explain", "rounds.quorum").stdout
    assert run("config", "explain", "device", "--kind", "client").exit_code == 0
    assert run("config", "explain", "device", "--kind", "klient").exit_code == 2


def test_config_show_prints_a_conf_that_loads_again(project: Path) -> None:
    shown = run("config", "show", "rounds.count=7").stdout
    (project / "again.yaml").write_text(shown)
    again = json.loads(run("config", "show", "--conf", "again.yaml", "--json").stdout)
    assert again["rounds"]["count"] == 7


def test_export_of_an_unfinished_run_is_refused(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    folder = next(project.glob("runs/*"))
    (folder / "summary.json").unlink()
    result = run("export", "last")
    assert result.exit_code == 5
    assert "not finished" in result.stderr


def test_export_without_a_key_says_how_to_get_one(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    result = run("export", "last", "--key", "keys/none.pem")
    assert result.exit_code == 4
    assert "lepton-fed init" in result.stderr

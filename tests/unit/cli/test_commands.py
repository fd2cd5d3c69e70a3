from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lepton_fed.cli import app, demo, screen

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
def test_the_shipped_confs_pass_their_check_once_the_keys_are_there(
    project: Path, kind: str
) -> None:
    assert run("keys", "coordinator").exit_code == 0
    for site in ("north", "east", "south"):
        assert run("keys", "site", site).exit_code == 0
        assert run("keys", "enrol", f"keys/{site}.enrol.json").exit_code == 0
    result = run("check", "--conf", f"conf/{kind}.yaml", "--json")
    report = json.loads(result.stdout)
    failed = [item["name"] for item in report["checks"] if item["problems"]]
    # There is no coordinator to reach here.
    assert failed == (["connection"] if kind == "client" else []), result.output
    assert result.exit_code == (5 if kind == "client" else 0)


@pytest.mark.parametrize("kind", ["server", "client"])
def test_before_the_keys_are_made_the_check_says_how(project: Path, kind: str) -> None:
    result = run("check", "--conf", f"conf/{kind}.yaml")
    assert result.exit_code == 4
    assert "lepton-fed keys" in result.stderr


def test_check_reports_every_failure_with_its_place(project: Path) -> None:
    result = run("check", "device=cuda:63", "privacy.record.epsilon=0.0001", "sites.count=3")
    assert result.exit_code == 2
    assert "command line: device=cuda:63" in result.stderr
    assert "command line: privacy.record.epsilon=0.0001" in result.stderr
    assert "2 problems" in result.stderr


def test_check_says_once_what_several_of_its_lines_fail_by(project: Path) -> None:
    shared = ("privacy.record.noise=shared", "privacy.secure_aggregation.enabled=true",
              "privacy.record.sampling_rate=0.25", "task.training.epochs=null",
              "task.training.steps=1", "task.training.momentum=0")  # fmt: skip
    result = run("check", *shared, "task.training.learning_rate=1e30")
    assert result.stdout.count("FAILED") == 2
    assert "command line: task.training.learning_rate=1e30" in result.stderr
    assert "1 problem;" in result.stderr


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


def refused(result: Result, code: str, exit_code: int) -> str:
    """The one problem a command ended with."""
    assert result.exit_code == exit_code, result.output
    assert f"[{code}]" in result.stderr
    assert "1 problem;" in result.stderr
    return result.stderr.splitlines()[0]


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_init_of_a_file_or_an_impossible_name_is_a_located_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    before = tree(tmp_path)
    assert refused(run("init", "file"), "LF1204", 2) == "file/conf"
    assert "n" * 300 in refused(run("init", f"deep/{'n' * 300}"), "LF1204", 2)
    assert tree(tmp_path) == before


def test_init_that_fails_removes_what_it_wrote_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine/conf").mkdir(parents=True)
    Path("mine/conf/notes").write_text("mine")
    before = tree(tmp_path)
    for step in (1, 2, 3):
        opened = Path.open
        calls = iter(range(1, 4))

        def filling(
            self: Path, *given: Any, opened: Any = opened, calls: Any = calls, step: int = step,
            **named: Any,
        ) -> Any:  # fmt: skip
            if self.suffix == ".yaml" and next(calls) == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return opened(self, *given, **named)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", filling)
            refused(run("init", "mine"), "LF1204", 2)
        assert tree(tmp_path) == before
    with monkeypatch.context() as patched:  # the key fails by itself, after the confs
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        refused(run("init", "mine/new"), "LF4157", 4)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("folder", "first"),
    [(".", "next: lepton-fed check"), ("p", "next: cd p, then lepton-fed check"),
     ("a b/c", "next: cd 'a b/c', then lepton-fed check")],
)  # fmt: skip
def test_init_says_where_to_go_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, first: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", folder).stdout.splitlines()[-1].startswith(first)


def test_what_the_system_refuses_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, screen.guarded(as_json=True):
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")
    assert caught.value.exit_code == 5
    told = capsys.readouterr()
    assert told.err.startswith("some/file\n  the operating system refused: Permission denied [LF")
    (problem,) = json.loads(told.out)["error"]["problems"]
    assert (problem["code"], problem["where"]) == ("LF5401", "some/file")


def test_predict_runs_on_a_number_of_threads_that_a_machine_may_have() -> None:
    result = run("predict", "--bundle", "b", "--input", "x.csv", "--threads", "100000")
    assert result.exit_code == 2
    assert "1<=x<=256" in result.stderr


def test_predict_names_an_argument_of_the_reader_as_it_was_typed(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    assert run("export", "last").exit_code == 0
    bundle = str(next(project.glob("runs/*/bundle")))
    words = ("predict", "--bundle", bundle, "--input", "rows.npz", "arguments.foo=1", "--json")
    result = run(*words)
    (problem,) = json.loads(result.stdout)["error"]["problems"]
    assert (problem["key"], problem["where"]) == ("arguments.foo", "command line: arguments.foo=1")


def test_predict_refuses_its_output_before_it_reads(project: Path) -> None:
    assert run("simulate", *SMALL).exit_code == 0
    assert run("export", "last").exit_code == 0
    bundle = next(project.glob("runs/*/bundle"))
    key = project / "keys" / "coordinator.pub"
    for output in ("", "keys", "rows.npz", str(bundle / "new.csv"), str(key)):
        result = run("predict", "--bundle", str(bundle), "--input", "rows.npz", "--output", output)
        refused(result, "LF3222", 2)
    assert key.read_text().startswith("-----BEGIN PUBLIC KEY")


def test_the_demo_says_how_long_the_runs_were_that_it_compares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lepton_fed.simulations.demo.REPEATED_ROUNDS", 7)
    summary = SimpleNamespace(
        sites=[],
        delta=None,
        digest="d" * 64,
        outside_epsilon=[],
        metrics={},
        error_bounds={},
        masked=True,
        client=None,
    )
    manifest = SimpleNamespace(task="t" * 64, version=1)
    bundle = SimpleNamespace(manifest=manifest, folder=Path("b"))
    done = SimpleNamespace(
        summary=summary,
        sites={},
        comparison=[],
        digests=("e", "e"),
        report=SimpleNamespace(bundle=bundle, signer="s"),
        refusal="r",
        predicted=Path("p"),
    )
    demo._show(done, Path("demo"))
    said = capsys.readouterr().out
    assert "without DP  e  (two simulations of 7 rounds: equal)" in said
    assert "updates are masked: the coordinator read their sums alone" in said


@pytest.mark.parametrize("words", [("--resume", ""), ("--resume", "last", "--new")])
def test_a_coordinator_is_not_told_to_go_on_with_nothing_or_with_two_things(
    project: Path, words: tuple[str, ...]
) -> None:
    done = run("server", "--conf", str(project / "conf" / "server.yaml"), *words)
    assert done.exit_code == 2
    assert "LF1058" in done.output
    assert not (project / "state").exists()

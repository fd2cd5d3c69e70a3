"""docs/reference/run-folder.md against the source, and its programs against a real run."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from lepton_fed.cli import app
from lepton_fed.clients.own_ledger import HeadFile
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger import Ledger
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.chain import Head
from lepton_fed.privacy.ledger.rows import KnownRows
from lepton_fed.runs.summary import RunSummary, SiteSummary

ROOT = Path(__file__).parents[3]
PAGE = "reference/run-folder.md"
TEXT = (ROOT / "docs" / PAGE).read_text()

CONF = """
kind: simulation
task:
  name: wine
  data:
    columns: [{name: alcohol, mean: 13, std: 0.8}, {name: hue, mean: 1, std: 0.2}]
    target: {name: grower, classes: [class_0, class_1, class_2]}
  preprocessing: [{step: standardise}]
  model: {name: linear}
rounds: {count: 3}
sites: {count: 2, source: {reader: wine}}
"""


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading or sentence."""
    rows = f"\n{TEXT}".split(f"\n{heading}\n", 1)[1].split("\n|---", 1)[1].split("\n\n", 1)[0]
    return [row.strip("| ").split(" | ") for row in rows.splitlines()[1:]]


def first_words(heading: str) -> list[str]:
    return [row[0].strip("`") for row in table(heading)]


@pytest.fixture(scope="module")
def run(opened) -> Path:
    (opened.folder / "wine.yaml").write_text(CONF)
    result = CliRunner().invoke(app, ["simulate", "--conf", "wine.yaml"])
    assert result.exit_code == 0, result.output
    (folder,) = opened.folder.glob("runs/*")
    return folder


def program(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder.parents[1] / name
    return subprocess.run(
        [sys.executable, path], cwd=folder, capture_output=True, text=True, check=False
    )


def emitted() -> dict[str, set[str]]:
    """Return the fields of every event that the package emits, by the event's name."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "lepton_fed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "emit"
            ):
                name = ast.literal_eval(node.args[0])
                found.setdefault(name, set()).update(str(each.arg) for each in node.keywords)
    return found


def test_the_events_of_the_page_are_those_of_the_source_with_their_fields() -> None:
    listed = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in table("## events.jsonl")
    }
    assert listed == emitted()


def test_a_run_leaves_the_files_of_the_page(run: Path) -> None:
    listed = set(first_words("# The run folder"))
    written = {str(each.relative_to(run)) for each in run.rglob("*") if each.is_file()}
    known = {re.sub(r"round-\d+", "round-0007", each) for each in written}
    assert known <= listed
    assert {each for each in listed if "/" not in each} <= known


def test_the_keys_of_the_summary_are_those_of_the_page(run: Path) -> None:
    assert first_words("## summary.json") == [each.name for each in fields(RunSummary)]
    assert first_words("Each site:") == [each.name for each in fields(SiteSummary)]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary) == first_words("## summary.json")
    assert list(summary["sites"][0]) == first_words("Each site:")


def test_the_page_s_program_finds_a_whole_log_whole(run: Path) -> None:
    lines = len((run / "events.jsonl").read_bytes().splitlines())
    assert program("verify_events.py", run).stdout == f"{lines} events, whole\n"


def _changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":2'), *lines[2:]]


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (_changed, "line 3 does not follow"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3 does not follow"),
        (lambda lines: lines[1:], "line 1 does not follow"),
        (lambda lines: lines[:-1], "cut off or added"),
    ],
    ids=["changed", "removed", "removed first", "cut off"],
)
def test_the_page_s_program_finds_what_was_done_to_a_log(run, tamper, found) -> None:
    log = run / "events.jsonl"
    whole = log.read_bytes()
    try:
        log.write_bytes(b"".join(tamper(whole.splitlines(keepends=True))))
        assert log.read_bytes() != whole
        done = program("verify_events.py", run)
    finally:
        log.write_bytes(whole)
    assert done.returncode == 1
    assert found in done.stderr


def test_the_run_digest_follows_from_the_log_as_the_page_says(run: Path) -> None:
    digest = json.loads((run / "summary.json").read_text())["digest"]
    assert program("run_digest.py", run).stdout == f"{digest}\n"


def test_metrics_csv_begins_as_on_the_page(run: Path) -> None:
    (shown,) = re.findall(r"## metrics.csv\n\n```text\n(.+)\n", TEXT)
    header, first, *_ = (run / "metrics.csv").read_text().splitlines()
    assert header == shown
    assert first.startswith("0,all,loss,")


def test_checkpoints_and_model_hold_what_the_page_says(run: Path) -> None:
    kept = sorted((run / "checkpoints").iterdir())
    assert [each.name for each in kept] == ["round-0002.safetensors", "round-0003.safetensors"]
    with (
        safe_open(kept[-1], "numpy") as checkpoint,
        safe_open(run / "model.safetensors", "numpy") as model,
    ):
        assert list(checkpoint.keys()) == ["model"]
        assert set(checkpoint.metadata()) == {"round", "digest", "task", "layout", "record"}
        assert set(model.metadata()) == {"task", "layout", "digest"}
        sizes = [model.get_tensor(name).size for name in model.keys()]  # noqa: SIM118
        assert sum(sizes) == checkpoint.get_tensor("model").size


def test_a_ledger_s_entries_are_made_as_the_page_says(tmp_path: Path) -> None:
    event, run = SampledGaussian(2.0, 0.1, 3), RunName("r", "a" * 64, "c")
    rows = KnownRows(tmp_path / "ledger.key", lambda: [b"1"])
    keeper = HeadFile(tmp_path / "head")
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(
        path, dataset="d", content="d", epsilon=8.0, delta=1e-5, rows=rows, keeper=keeper
    )
    ledger.reserve(event, run, 2)
    ledger.charge(event, run, 1, "t")
    ledger.note_answer(run, 1, "0" * 32)
    ledger.release("r", "done")
    lacking = Ledger(
        path, dataset="d", content="d", epsilon=8.0, delta=1e-5, noted=[Head(9, "f" * 64)],
        check_heads=False,
    )  # fmt: skip
    lacking.accept_older_copy()
    kinds = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1]))
        for row in table("By its kind it has more:")
    }
    always = set(first_words("In every entry:"))
    found: dict[str, set[str]] = {}
    for entry in ledger.entries():
        said = set(entry.body) - always
        found.setdefault(str(entry.body["kind"]), set()).update(said)
        if "event" in entry.body:
            assert list(entry.body["event"]) == first_words("An event:")
    assert {kind: keys - {"head"} for kind, keys in kinds.items()} == found

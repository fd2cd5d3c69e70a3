"""`lepton-fed receipts`: read by a security officer, on a terminal or by a program."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app
from lepton_fed.clients.receipts import Receipts, receipt_of
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.errors import Problem

ABOUT = {
    "time": "2026-01-05T12:00:00+00:00",
    "site": "north",
    "coordinator": "lusab-babad-gutih-tugad",
    "address": "fed.example.org:9092",
    "run": "run-1",
    "task": "b" * 64,
    "policy": "c" * 64,
}
UPDATE = Update("l", {"delta": np.array([3, 4], np.float32)}, 1.0, {"delta": 50.0})


def run(*words):
    return CliRunner().invoke(app, ["receipts", "--conf", "client.yaml", *words])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A site's folder with its conf."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client.yaml").write_text("kind: client\nname: north\nstate: state/north\n")
    return tmp_path / "state" / "north" / "receipts"


@pytest.fixture
def kept(folder):
    """An update, a refusal in a run with a rude name, and a refusal of a run nobody agreed to."""
    found = Receipts(folder)
    ask = Ask("a" * 64, "l", 1, True, True, {})
    reply = Reply("north", UPDATE, np.ones(7), epsilon=0.5, noise_multiplier=1.5)
    found.write(receipt_of(reply, ask, ABOUT))
    refusal = Reply("north", refusal=Problem("LF4605", "not now"))
    found.write(receipt_of(refusal, ask, {**ABOUT, "run": "[red]run\x1b[2J"}))
    found.write(receipt_of(refusal, ask, {**ABOUT, "run": "", "task": ""}))
    return found


def test_before_anything_left_it_says_so(folder):
    result = run()
    assert result.exit_code == 0
    assert "nothing has left this site" in result.stdout


def test_all_receipts_are_listed_in_short_with_the_hash_to_note_down(kept):
    result = run()
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "3 receipts, chain whole" in text
    assert kept.head() in result.stdout
    for word in ("an update", "evaluation", "epsilon", "noise multiplier", "8 B"):
        assert word in text
    assert text.count("a refusal, LF4605") == 2
    assert "\x1b" not in result.stdout
    assert "[red]run?[2J" in text, "as it is: no markup"


def test_one_receipt_is_shown_whole(kept):
    result = run("--number", "1")
    assert result.exit_code == 0, result.output
    first = kept.read()[0]
    for words in (
        "receipt 1 of site north",
        "fed.example.org:9092, coordinator lusab-babad-gutih-tugad",
        "run run-1, round 1",
        "delta: 2 numbers, 8 B, norm 50 before clipping, 5 after",
        first.vectors["delta"].sha256,
        first.task,
        first.policy,
        first.agreement,
        "7 counts on held-out rows",
    ):
        assert words in result.stdout, words
    assert "refusal" not in result.stdout


def test_a_refusal_is_shown_as_one_and_says_that_no_run_was_agreed_to(kept):
    result = run("--number", "3")
    assert "refusal       LF4605" in result.stdout
    assert "run -, round 1" in result.stdout
    assert "sha256" not in result.stdout


def test_a_file_s_text_is_printed_as_it_is_but_for_what_a_terminal_obeys(kept):
    last = kept.read()[-1]
    kept.write(replace(last, run="[red]x\x1b[2J", refusal="[b]\x1b]0;title"))
    for words in ((), ("--number", "4")):
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
        assert "[red]x?[2J" in result.stdout
        assert "[b]?]0;title" in " ".join(result.stdout.split())


def test_json_holds_every_receipt_or_the_one_that_is_asked_for(kept):
    every = json.loads(run("--json").stdout)
    assert list(every) == ["receipts", "head"]
    assert every["head"] == kept.head()
    assert [each["refusal"] for each in every["receipts"]] == ["", "LF4605", "LF4605"]
    one = json.loads(run("--number", "1", "--json").stdout)
    assert one == every["receipts"][0]
    assert one["vectors"]["delta"]["norm_before"] == 50.0


@pytest.mark.parametrize(("number", "code"), [("4", "LF1205"), ("999999999", "LF1205")])
def test_a_receipt_that_is_not_there_is_a_wrong_command_line(kept, number, code):
    result = run("--number", number)
    assert result.exit_code == 2
    assert code in result.stderr
    assert run("--number", "0").exit_code == 2


def test_a_changed_receipt_is_refused_and_nothing_is_shown(kept, folder):
    first = sorted(folder.glob("*.json"))[0]
    first.write_bytes(first.read_bytes().replace(b'"epsilon":"0.5"', b'"epsilon":"0.1"'))
    for words in ((), ("--number", "1"), ("--json",)):
        result = run(*words)
        assert result.exit_code == 4
        assert "LF4641" in result.stderr
        assert "0.1" not in result.stdout


def test_the_state_folder_is_the_conf_s(kept):
    assert "nothing has left" in run("state=elsewhere").stdout
    assert "3 receipts" in run().stdout

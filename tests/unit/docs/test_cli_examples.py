"""docs/reference/cli.md: its examples are run, its JSON keys are those that are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app

PAGE = "reference/cli.md"
TEXT = (Path(__file__).parents[3] / "docs" / PAGE).read_text()
JSON_KEYS = {
    section: re.findall(r"`(\w+)`", re.split(r"[;.]", re.sub(r"\(.*?\)", "", keys))[0])
    for section, keys in re.findall(
        r"^## lepton-fed (.+)\n(?:(?!## ).*\n)*?JSON keys(?:, [^:]+)?: ((?:.+\n)+)",
        TEXT,
        re.MULTILINE,
    )
}
WITH_OTHERS = (
    "demo",
    "simulate",
    "server",
    "client",
    "push",
    "receipts",
    "ledger show",
    "ledger verify",
    "ledger export",
    "ledger release",
    "ledger accept",
    "keys accept",
    "runs submit",
    "runs follow",
)
"""Commands that need a federation, or print what another page describes."""

WORDS = {
    "keys site": ("north",),
    "keys enrol": ("keys/north.enrol.json",),
    "keys remove": ("north",),
    "keys show": ("keys/coordinator.pub",),
    "init": ("other",),
    "config explain": ("rounds.count",),
    "simulate": ("rounds.count=1", "privacy.record.enabled=false"),
    "export": ("last", "--out", "elsewhere"),
    "predict": ("--bundle", "elsewhere", "--input", "new.npz"),
    "privacy plan": ("--rows", "300"),
    "runs show": ("last",),
    "audit": ("last",),
}


@pytest.fixture(scope="module")
def walked(opened):
    opened.run()
    return opened


def test_the_examples_print_what_the_page_says(walked):
    assert (walked.folder / "predictions.csv").is_file()


@pytest.mark.parametrize("command", [name for name in JSON_KEYS if name not in WITH_OTHERS])
def test_the_json_keys_are_those_that_are_printed(walked, command):
    result = CliRunner().invoke(app, [*command.split(), *WORDS.get(command, ()), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed[0] if isinstance(printed, list) else printed) == JSON_KEYS[command]


def test_every_command_with_json_tells_its_keys(walked):
    takes_json = set(re.findall(r"^## lepton-fed (.+)\n(?:(?!## ).*\n)*?\| `--json`", TEXT, re.M))
    assert set(JSON_KEYS) == takes_json

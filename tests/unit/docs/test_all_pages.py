"""What holds for every page: it is in the index, and the commands it shows exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from lepton_fed.cli import app
from lepton_fed.errors import (
    BudgetExceeded,
    BundleRefused,
    ConfError,
    DataError,
    LeptonError,
    MissingExtra,
    Refused,
    RunError,
    TaskError,
    UpdateRefused,
)

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
FAMILIES = {
    ConfError: "1",
    DataError: "2",
    TaskError: "3",
    Refused: "4",
    BudgetExceeded: "4",
    BundleRefused: "4",
    UpdateRefused: "4",
    RunError: "5",
    MissingExtra: "6",
}


def commands_on(page: Path) -> list[list[str]]:
    """Return the words of each `lepton-fed` command in the fenced blocks of a page."""
    found = []
    for kind, block in re.findall(
        r"^```(sh|text|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        prompt = "" if kind == "sh" else r"\$ "
        whole = block.replace("\\\n", " ")
        found += [
            shlex.split(line.split(" && ")[0], comments=True)
            for line in re.findall(rf"^{prompt}lepton-fed (.+)$", whole, re.MULTILINE)
        ]
    return found


def test_every_page_is_in_the_index() -> None:
    listed = {
        (DOCS / target).resolve()
        for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / "README.md").read_text())
    }
    assert {page.resolve() for page in DOCS.rglob("*.md")} - listed == {DOCS / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_ones_the_program_takes(page: Path) -> None:
    for words in commands_on(page):
        command, rest = get_command(app), list(words)
        while isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        try:
            # Reads the words as running it would, and runs nothing.
            command.make_context("lepton-fed", rest)
        except click.exceptions.Exit:  # an option that prints and stops
            continue
        except click.ClickException as error:
            pytest.fail(f"{words}: {error.format_message()}")
        assert not isinstance(command, click.Group), f"{words}: no such command"


def test_commands_are_found_on_the_pages() -> None:
    assert sum(len(commands_on(page)) for page in PAGES) > 20


def test_each_code_of_the_errors_page_stands_once_and_in_its_family() -> None:
    text = (DOCS / "reference" / "errors.md").read_text()
    rows = re.findall(r"^\| (LF\d{4}) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    codes = [code for code, _, _ in rows]
    assert len(codes) == len(set(codes)) > 150
    parts = re.findall(r"^## LF(\d)xxx.*\n((?:(?!## ).*\n)*)", text, re.MULTILINE)
    assert sum(len(re.findall(r"^\| LF\d", part, re.MULTILINE)) for _, part in parts) == len(codes)
    for family, part in parts:
        assert set(re.findall(r"^\| LF(\d)", part, re.MULTILINE)) == {family}


def test_the_families_have_the_exit_codes_of_the_errors_page() -> None:
    text = (DOCS / "reference" / "errors.md").read_text()
    listed = {
        family: int(code)
        for code, families in re.findall(r"^\| (\d+) \| .* \| (LF.*) \|$", text, re.MULTILINE)
        for family in re.findall(r"LF(\d)xxx", families)
    }
    assert {FAMILIES[error]: error.exit_code for error in FAMILIES} == listed
    assert set(FAMILIES) == set(_below(LeptonError))


def _below(kind: type[LeptonError]) -> list[type[LeptonError]]:
    return [each for child in kind.__subclasses__() for each in (child, *_below(child))]

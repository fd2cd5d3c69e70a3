"""docs/reference/cli.md against the program: every command and option, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from lepton_fed.cli import app
from lepton_fed.cli.screen import EXIT_CODES

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "reference" / "cli.md").read_text()
SECTIONS = dict(re.findall(r"^## (lepton-fed.*)\n((?:(?!## ).*\n)*)", TEXT, re.MULTILINE))


def commands(group: click.Command, name: str = "lepton-fed") -> Iterator[tuple[str, click.Command]]:
    """Yield every command that does something by itself, and the program, by full name."""
    if not isinstance(group, click.Group):
        yield name, group
        return
    if group.params:
        yield name, group
    for word, command in group.commands.items():
        yield from commands(command, f"{name} {word}")


COMMANDS = dict(commands(get_command(app)))


def spelling(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return ", ".join([*parameter.opts, *parameter.secondary_opts])
    return (parameter.metavar or str(parameter.name).upper()).strip("[].")


def default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "must be given"
    return f"`{parameter.default}`" if parameter.default else ""


def test_every_command_has_a_section_and_every_section_is_a_command() -> None:
    assert sorted(SECTIONS) == sorted(COMMANDS)


def test_the_overview_names_and_links_every_command() -> None:
    listed = re.findall(r"^\| \[`(.+?)`\]\(#(.+?)\) \|", TEXT, re.MULTILINE)
    assert [name for name, _ in listed] == [name for name in SECTIONS if name != "lepton-fed"]
    assert all(anchor == name.replace(" ", "-") for name, anchor in listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_lists_the_arguments_and_options_with_their_defaults(name: str) -> None:
    listed = re.findall(r"^\| `(.+?)` \| (.*?) ?\| (.+) \|$", SECTIONS[name], re.MULTILINE)
    assert [(word, value) for word, value, _ in listed] == sorted(
        ((spelling(each), default(each)) for each in COMMANDS[name].params),
        key=lambda row: row[0].startswith("-"),
    )


def test_no_other_option_is_named_anywhere_on_the_page() -> None:
    there = {"--help"} | {
        word for command in COMMANDS.values() for each in command.params for word in each.opts
    }
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", TEXT)) <= there


def test_the_exit_codes_of_the_help_are_those_of_the_errors_page() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    listed = re.findall(r"^\| (\d+) \| .+ \|$", page, re.MULTILINE)
    assert listed == re.findall(r"(?:: |; )(\d+) ", EXIT_CODES)
    used = {code for text in SECTIONS.values() for code in re.findall(r"(?<=[;:] )(\d) ", text)}
    assert used <= set(listed)

"""``lepton-fed keys accept``: what is pinned is what the person was shown."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lepton_fed.cli import app
from lepton_fed.config import load
from lepton_fed.errors import Refused
from lepton_fed.identity.pinned import PinnedRoster
from lepton_fed.identity.roster import enrol


@pytest.fixture
def pinned(conf, parties, monkeypatch):
    """Return what the site has pinned, read anew at each call as the running site does."""
    monkeypatch.setattr(
        load, "load_conf", lambda *given, **named: load.Loaded(conf, "client.yaml", {})
    )
    Path(conf.state).mkdir()
    key = parties.coordinator.public_key()
    return lambda: PinnedRoster(Path(conf.roster), Path(conf.state), key, False)


def offer(pinned, parties, roster):
    with suppress(Refused):
        pinned().consider(parties.signed(roster))


def accept(*words):
    return CliRunner().invoke(app, ["keys", "accept", *words])


def test_a_roster_that_comes_while_the_person_telephones_is_not_pinned(
    pinned, parties, monkeypatch
):
    shown = enrol(parties.roster, parties.another("south"))
    evil = enrol(shown, parties.another("evil"))
    offer(pinned, parties, shown)

    def telephone(question, **named):
        offer(pinned, parties, evil)

    monkeypatch.setattr(typer, "confirm", telephone)
    said = accept()
    assert "south" in said.output
    assert "evil" not in said.output
    assert "LF4180" in said.output
    assert said.exit_code == 4
    assert pinned().current == parties.roster
    assert pinned().offered() == evil


def test_the_roster_that_was_shown_is_pinned(pinned, parties, monkeypatch):
    shown = enrol(parties.roster, parties.another("south"))
    offer(pinned, parties, shown)
    monkeypatch.setattr(typer, "confirm", lambda question, **named: True)
    assert accept().exit_code == 0
    assert pinned().current == shown


def test_without_questions_the_roster_that_waits_is_pinned_and_told(pinned, parties):
    assert accept("--yes").exit_code == 4, "none waits"
    shown = enrol(parties.roster, parties.another("south"))
    offer(pinned, parties, shown)
    told = json.loads(accept("--yes", "--json").stdout)
    assert told["version"] == shown.version
    assert told["changes"][0].startswith("added    south")
    assert pinned().current == shown

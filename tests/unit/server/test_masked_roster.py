"""A roster that changes in the middle of a masked run.

The coordinator goes by the new one at once; each site when its owner has accepted it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lepton_fed.core.exchange import PhaseAsk, PhaseReply
from lepton_fed.core.pace import Deadline
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.runs.events import EventLog
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.masked import MaskedRounds
from tests.unit.server.masked_world import SHAPE, Line, MaskedWorld

BEFORE_REVEAL = ("advertise", "share", "mask", "confirm")
CHANGES = ("added", "renewed", "removed")


@dataclass
class ChangingLine(Line):
    """A line on which the roster changes before a phase is first asked.

    Args:
        change: How it changes; empty for not.
        before: The phase.
        accept: Whether all sites accept it at once.
    """

    change: str = ""
    before: str = ""
    accept: bool = False
    done: bool = field(default=False, init=False)

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        if not self.done and next(iter(asks.values())).phase == self.before:
            self.done = True
            changed(self.world, self.change)
            if self.accept:
                self.world.pin()
        return super().phase(asks, deadline, answer_bytes)


def changed(world: MaskedWorld, change: str) -> None:
    if change == "removed":
        del world.roster["e"]
        return
    key = PrivateKey.generate()
    if change == "renewed":
        world.identities["e"] = key
    world.roster["f" if change == "added" else "e"] = key.public_key()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[MaskedWorld]:
    made = MaskedWorld(tmp_path)
    made.pin()
    yield made
    assert set(made.answered.values()) <= {1}, "a site trained twice for one round"


class Run:
    """A coordinator that stays the same from round to round."""

    def __init__(self, world: MaskedWorld) -> None:
        self.world = world
        self.log = EventLog(world.folder.events)
        self.masked = MaskedRounds(
            world.agreement, SHAPE, world.folder, self.log, lambda: world.roster
        )

    def round(self, number: int, line: Line) -> list[GroupSum]:
        world = self.world
        cohort = [name for name in world.names if name in world.roster]
        sums = self.masked.sums(line, world.ask(number), cohort, None, lambda _: None)
        for group in sums:
            world.require_sum(group, world.ask(number))
        self.masked.forget()
        return sums


@pytest.fixture
def run(world: MaskedWorld) -> Iterator[Run]:
    run = Run(world)
    yield run
    run.log.close()


def left(world: MaskedWorld) -> tuple[str, ...]:
    return tuple(name for name in world.names if name in world.roster)


@pytest.mark.parametrize("before", [*BEFORE_REVEAL, "reveal"])
@pytest.mark.parametrize("change", ["added", "removed"])
def test_what_is_in_progress_ends_under_the_roster_that_all_have_and_rounds_wait_for_the_owners(
    world: MaskedWorld, run: Run, change: str, before: str
) -> None:
    (group,) = run.round(1, ChangingLine(world, change=change, before=before))
    assert group.names == tuple("abcde")
    line = Line(world)
    assert run.round(2, line) == []
    assert {code for _, code in world.refusals()} == {"LF4515"}
    assert line.came("advertise") == []
    world.pin(*"abc")  # three owners have looked, two have not
    (event, *_) = world.events("secagg.abandoned")
    assert event["phase"] == "advertise"
    (group,) = run.round(3, Line(world))
    assert group.names == tuple("abc")


@pytest.mark.parametrize("before", BEFORE_REVEAL)
@pytest.mark.parametrize("change", CHANGES)
def test_an_attempt_whose_sites_have_accepted_meanwhile_is_made_again_under_the_new_digest(
    world: MaskedWorld, run: Run, change: str, before: str
) -> None:
    """Each masks the vector that it has stored; nothing of the first attempt serves the second."""
    line = ChangingLine(world, change=change, before=before, accept=True)
    (group,) = run.round(1, line)
    assert group.names == left(world)
    assert {asked.attempt for _, asked in line.asked} == {1, 2}
    assert line.came("reveal", 1) == []
    assert {code for _, code in world.refusals()} == {"LF4515"}
    again = Line(world)
    (group,) = run.round(2, again)
    assert group.names == left(world)
    assert again.came("advertise") == [], "their keys came with the last message of the round"


@pytest.mark.parametrize("change", CHANGES)
def test_once_shares_were_asked_for_the_round_is_lost_and_the_next_goes_by_the_new_roster(
    world: MaskedWorld, run: Run, change: str
) -> None:
    line = ChangingLine(world, change=change, before="reveal", accept=True)
    assert run.round(1, line) == []
    assert {asked.attempt for _, asked in line.asked} == {1}
    (group,) = run.round(2, Line(world))
    assert group.names == left(world)


@pytest.mark.parametrize("change", CHANGES)
def test_keys_that_were_given_for_the_next_round_are_void_under_another_roster(
    world: MaskedWorld, run: Run, change: str
) -> None:
    run.round(1, Line(world))
    changed(world, change)
    world.pin()
    line = Line(world)
    (group,) = run.round(2, line)
    assert group.names == left(world)
    assert line.came("advertise") == list(left(world))
    assert {asked.attempt for _, asked in line.asked} == {1}
    assert world.refusals() == []


def test_with_too_few_left_on_the_new_roster_no_other_attempt_is_made(
    tmp_path: Path,
) -> None:
    world = MaskedWorld(tmp_path, tuple("ade"))
    world.pin()
    run = Run(world)
    line = ChangingLine(world, change="removed", before="mask", accept=True)
    assert run.round(1, line) == []
    assert {asked.attempt for _, asked in line.asked} == {1}
    run.log.close()

"""A roster that changes in the middle of a masked run.

The coordinator goes by the new one at once; each site when its owner has accepted it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lepton_fed.core.exchange import Offer, OfferReply, PhaseAsk, PhaseReply
from lepton_fed.core.pace import Deadline
from lepton_fed.errors import Problem
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.runs.events import EventLog
from lepton_fed.server.federation import Federation, RosterChange
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.masked import MaskedRounds
from lepton_fed.server.rounds import Late
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
        after: Called then.
    """

    change: str = ""
    before: str = ""
    accept: bool = False
    after: Callable[[], None] = lambda: None
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
            self.after()
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
    # Of adverts alone nothing can come, so an attempt that failed there keeps its number.
    attempts = {1} if before == "advertise" else {1, 2}
    assert {asked.attempt for _, asked in line.asked} == attempts
    assert sorted(line.came("reveal", max(attempts))) == sorted(left(world))
    assert line.came("reveal") == line.came("reveal", max(attempts))
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


@dataclass
class OfferingLine(ChangingLine):
    """A line on which sites are offered the run; an owner who has not looked keeps theirs out."""

    looked: set[str] = field(default_factory=set)
    offered: list[str] = field(default_factory=list)
    said: list[OfferReply] = field(default_factory=list)

    def sites(self) -> list[str]:
        return list(left(self.world))

    def offer(self, offers: Mapping[str, Offer], limit_s: float) -> None:
        for name, offer in offers.items():
            self.offered.append(name)
            if offer.roster != b"1" and name not in self.looked:
                problem = Problem("LF4512", "the roster has changed", where=name)
                self.said.append(OfferReply(name, refusal=problem))
                continue
            self.world.pin(name)
            self.said.append(OfferReply(name, self.world.agreement.digest))

    def offer_replies(self) -> list[OfferReply]:
        said, self.said = self.said, []
        return said

    def take_late(self) -> list[Late]:
        return []


@pytest.mark.parametrize("before", ["share", "reveal"])
@pytest.mark.parametrize("change", CHANGES)
def test_all_sites_are_offered_the_run_again_and_take_part_once_their_owners_have_looked(
    world: MaskedWorld, run: Run, change: str, before: str
) -> None:
    line = OfferingLine(world, looked=set("abde"))
    nap: list[float] = []

    def wait(seconds: float) -> None:
        nap.append(seconds)
        world.now += seconds

    sites = Federation(line, world.agreement, b"1", world.names, 3, 60.0, run.log,
                       wait, lambda: world.now)  # fmt: skip
    sites.gather()
    assert line.offered == list("abcde")

    def round_of(number: int) -> tuple[str, ...]:
        cohort = list(sites.sites())
        for group in run.masked.sums(sites, world.ask(number), cohort, None, lambda _: None):
            world.require_sum(group, world.ask(number))
            return group.names
        return ()

    def renew() -> None:
        names = tuple(world.roster)
        sites.renew(RosterChange(b"2", 2, names, **{change: ("f" if change == "added" else "e",)}))

    line.change, line.before = change, before
    line.after = renew
    first = round_of(1)
    # Who has another identity now cannot go on with an attempt of the one before.
    assert set(first) >= set("abcd")
    line.offered.clear()
    known = [name for name in left(world) if name != "c"]
    assert list(round_of(2)) == known
    assert sorted(line.offered) == list(left(world))
    line.looked.add("c")
    world.now += 60
    assert round_of(3) == left(world)
    assert [event["site"] for event in world.events("site.refused")] == ["c"]
    assert "LF4515" not in {code for _, code in world.refusals()}

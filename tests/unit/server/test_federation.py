"""Who takes part in a run: the roster's sites that are online and agreed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, SecureAggregation, StrategyConf
from lepton_fed.core.exchange import Offer, OfferReply, Reply
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.execution import Left, left
from lepton_fed.server.federation import Federation, RosterChange
from lepton_fed.server.service import _awaited
from lepton_fed.server.standing import Record, SiteRecord, Standing

AGREEMENT = Agreement("run", Task(), StrategyConf(), 3, 1, Privacy())
NO = Problem("LF4601", "not this model")


class FakeLine:
    """Sites that come and go with time, and answer offers."""

    def __init__(self) -> None:
        self.online: Callable[[], Sequence[str]] = lambda: ["a", "b", "c"]
        self.says: dict[str, Callable[[], OfferReply]] = {}
        self.offered: list[str] = []
        self.waiting: list[str] = []
        self.mute: set[str] = set()
        self.rosters: list[Offer] = []

    def sites(self) -> Sequence[str]:
        return self.online()

    def offer(self, offers: Mapping[str, Offer], limit_s: float) -> None:
        for site, offer in offers.items():
            self.rosters.append(offer)
            self.offered.append(site)
            self.waiting.append(site)

    def offer_replies(self) -> list[OfferReply]:
        waiting, self.waiting = self.waiting, [s for s in self.waiting if s in self.mute]
        return [
            self.says.get(site, lambda s=site: OfferReply(s, AGREEMENT.digest))()
            for site in waiting
            if site not in self.mute
        ]

    def exchange(self, asks: Any, deadline: Any = None) -> Iterator[Reply]:
        yield from ()

    def take_late(self) -> list[Any]:
        return []


class World:
    def __init__(self, folder: Path) -> None:
        self.line = FakeLine()
        self.now = 0.0
        self.seen: list[Any] = []
        self.log = EventLog(folder / "events.jsonl", (self.seen.append,))

    def nap(self, seconds: float) -> None:
        self.now += seconds

    def federation(self, quorum: int = 2) -> Federation:
        return Federation(self.line, AGREEMENT, b"roster", "abc", quorum, 60.0, self.log,
                          self.nap, lambda: self.now)  # fmt: skip

    def events(self, name: str) -> list[Any]:
        return [event for event in self.seen if event["event"] == name]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.log.close()


def test_when_all_have_agreed_nobody_is_waited_for(world: World) -> None:
    sites = world.federation()
    sites.gather()
    assert list(sites.sites()) == ["a", "b", "c"]
    assert world.now == 0.0
    assert world.line.offered == ["a", "b", "c"]


def test_what_a_site_says_of_itself_is_written_down_when_it_agrees(world: World) -> None:
    said = OfferReply("b", AGREEMENT.digest, version="0.1.0", budget_left=2.5)
    world.line.says["b"] = lambda: said
    world.federation().gather()
    found = {e["site"]: (e["version"], e["budget_left"]) for e in world.events("site.agreed")}
    assert found == {"a": ("", None), "b": ("0.1.0", 2.5), "c": ("", None)}


def test_a_late_site_is_waited_for_and_then_the_quorum_goes_on(world: World) -> None:
    world.line.online = lambda: ["a", "b"]
    sites = world.federation()
    sites.gather()
    assert 60.0 <= world.now < 61.0
    assert list(sites.sites()) == ["a", "b"]
    assert world.events("sites.awaited")[-1]["sites"] == ["c"]
    world.line.online = lambda: ["a", "b", "c"]
    assert list(sites.sites()) == ["a", "b", "c"]  # from the next round on
    assert world.line.offered.count("c") == 1


def test_a_site_that_refuses_is_named_with_its_reason_and_asked_no_more(world: World) -> None:
    world.line.says["b"] = lambda: OfferReply("b", refusal=NO)
    sites = world.federation()
    sites.gather()
    assert world.now == 0.0
    assert list(sites.sites()) == ["a", "c"]
    (event,) = world.events("site.refused")
    assert (event["site"], event["code"], event["why"]) == ("b", "LF4601", "not this model")
    assert world.line.offered.count("b") == 1


def test_agreeing_to_something_else_is_no_agreement(world: World) -> None:
    world.line.says["b"] = lambda: OfferReply("b", "0" * 64)
    sites = world.federation()
    sites.gather()
    assert list(sites.sites()) == ["a", "c"]
    assert world.events("site.refused")[0]["code"] == "LF4413"


def test_a_site_whose_answer_was_lost_is_asked_again(world: World) -> None:
    answers = iter([OfferReply("b", refusal=Problem("LF5306", "no reply in time"))])
    world.line.says["b"] = lambda: next(answers, OfferReply("b", AGREEMENT.digest))
    sites = world.federation()
    sites.gather()
    assert list(sites.sites()) == ["a", "b", "c"]


def test_without_the_quorum_the_run_says_who_is_missing(world: World) -> None:
    world.line.online = lambda: ["a"]
    with pytest.raises(RunError) as failed:
        world.federation().gather()
    assert failed.value.code == "LF5004"
    assert "b, c" in failed.value.problems[0].remedy


def test_a_site_that_is_online_and_mute_holds_nobody_up(world: World) -> None:
    world.line.mute = {"c"}
    sites = world.federation()
    sites.gather()
    assert world.now == pytest.approx(60.0, abs=1.0), "gather_s, and no longer"
    before = world.now
    for _ in range(5):
        assert list(sites.sites()) == ["a", "b"]
    assert world.now == before, "a round does not wait for it"
    assert world.line.offered.count("c") == 1, "its answer may still come"
    world.line.mute.clear()
    assert list(sites.sites()) == ["a", "b", "c"]
    assert len(world.events("site.agreed")) == 3


def test_a_site_that_went_away_before_it_answered_is_offered_the_run_again(world: World) -> None:
    world.line.mute = {"c"}
    sites = world.federation()
    sites.gather()
    world.line.online = lambda: ["a", "b"]
    sites.sites()
    world.line.online = lambda: ["a", "b", "c"]
    sites.sites()
    assert world.line.offered.count("c") == 2
    world.line.mute.clear()
    assert list(sites.sites()) == ["a", "b", "c"]
    assert [event["site"] for event in world.events("site.agreed")] == ["a", "b", "c"]


def test_too_many_refusals_end_the_run_at_once(world: World) -> None:
    for site in "bc":
        world.line.says[site] = lambda s=site: OfferReply(s, refusal=NO)
    with pytest.raises(RunError) as failed:
        world.federation().gather()
    assert failed.value.code == "LF5005"
    assert "b, c" in failed.value.problems[0].remedy
    assert world.now == 0.0


def test_a_quorum_that_comes_back_in_time_goes_on(world: World) -> None:
    sites = world.federation()
    sites.gather()
    world.line.online = lambda: ["a", "c"] if world.now > 30 else ["a"]
    assert list(sites.sites()) == ["a", "c"]
    assert world.now > 30


CONFIRM = Problem("LF4176", "the roster changed, and nobody has looked at it yet")


def test_a_site_that_is_taken_off_the_roster_is_neither_asked_nor_waited_for(world: World) -> None:
    sites = world.federation(quorum=1)
    sites.gather()
    sites.renew(RosterChange(b"2", 2, ("a", "c"), removed=("b",)))
    assert list(sites.sites()) == ["a", "c"]
    world.line.online = lambda: ["a"]
    assert list(sites.sites()) == ["a"]
    (event,) = world.events("roster.changed")
    fields = ("version", "removed", "renewed", "added")
    assert [event[name] for name in fields] == [2, ["b"], [], []]
    assert not world.events("sites.awaited")


def test_a_site_with_new_keys_is_offered_the_run_again_with_the_new_roster(world: World) -> None:
    world.line.says["c"] = lambda: OfferReply("c", refusal=NO)
    sites = world.federation()
    sites.gather()
    world.line.offered.clear()
    world.line.online = lambda: ["a"]  # b is not connected yet with its new key
    sites.renew(RosterChange(b"2", 2, ("a", "b", "c"), renewed=("b", "c")))
    with pytest.raises(RunError):
        sites.sites()
    del world.line.says["c"]
    world.line.online = lambda: ["a", "b", "c"]
    assert list(sites.sites()) == ["a", "b", "c"]
    assert sorted(world.line.offered) == ["b", "c"]
    assert {offer.roster for offer in world.line.rosters[-2:]} == {b"2"}


def test_in_a_masked_run_every_site_has_to_go_by_the_new_roster(world: World) -> None:
    privacy = Privacy(secure_aggregation=SecureAggregation(enabled=True))
    masked = replace(AGREEMENT, privacy=privacy)
    world.line.says = {n: (lambda n=n: OfferReply(n, masked.digest)) for n in "abc"}
    sites = Federation(world.line, masked, b"roster", "abc", 2, 60.0, world.log,
                       world.nap, lambda: world.now)  # fmt: skip
    sites.gather()
    world.line.offered.clear()
    sites.renew(RosterChange(b"2", 2, ("a", "b", "c"), renewed=("b",)))
    assert list(sites.sites())
    assert sorted(world.line.offered) == ["a", "b", "c"]


def test_a_name_that_was_not_on_the_roster_takes_part_from_the_next_run_on(world: World) -> None:
    sites = world.federation()
    sites.gather()
    world.line.online = lambda: ["a", "b", "c", "d"]
    sites.renew(RosterChange(b"2", 2, ("a", "b", "c", "d"), added=("d",)))
    assert list(sites.sites()) == ["a", "b", "c"]
    assert "d" not in world.line.offered


def test_a_site_that_comes_back_onto_the_roster_takes_part_again(world: World) -> None:
    sites = world.federation()
    sites.gather()
    sites.renew(RosterChange(b"2", 2, ("a", "c"), removed=("b",)))
    sites.renew(RosterChange(b"3", 3, ("a", "b", "c"), added=("b",)))
    assert list(sites.sites()) == ["a", "b", "c"]
    assert world.line.offered.count("b") == 2


def test_a_site_whose_owner_has_yet_to_look_is_asked_again_and_told_of_once(world: World) -> None:
    answers = iter([OfferReply("b", refusal=CONFIRM)] * 3)
    world.line.says["b"] = lambda: next(answers, OfferReply("b", AGREEMENT.digest))
    sites = world.federation()
    sites.gather()
    assert world.now == 0.0, "the run does not wait for a person"
    for _ in range(4):
        assert list(sites.sites()) == ["a", "c"]
        world.nap(4.0)
    assert world.line.offered.count("b") == 2
    world.nap(10.0)
    assert list(sites.sites()) == ["a", "c"]
    world.nap(10.0)
    assert list(sites.sites()) == ["a", "b", "c"]
    assert len(world.events("site.refused")) == 1


def test_a_changed_roster_is_offered_at_once_to_whoever_waits_for_it(world: World) -> None:
    answers = iter([OfferReply("b", refusal=Problem("LF4175", "an older roster"))])
    world.line.says["b"] = lambda: next(answers, OfferReply("b", AGREEMENT.digest))
    sites = world.federation()
    sites.gather()
    assert list(sites.sites()) == ["a", "c"]
    sites.renew(RosterChange(b"2", 2, ("a", "b", "c"), renewed=("a",)))
    assert list(sites.sites()) == ["a", "b", "c"]


def test_a_run_that_goes_on_has_the_sites_it_began_with_and_no_others(world: World) -> None:
    # Begun with a, b and d; c was enrolled and d removed while the coordinator was away.
    sites = Federation(world.line, AGREEMENT, b"roster", "abc", 2, 60.0, world.log,
                       world.nap, lambda: world.now, of_run="abd")  # fmt: skip
    sites.gather()
    assert world.now == 0.0, "nobody waits for a site that is on the roster no more"
    assert list(sites.sites()) == ["a", "b"]
    world.line.online = lambda: list("abcd")
    sites.renew(RosterChange(b"next", 2, tuple("abcd"), added=("d",)))
    assert list(sites.sites()) == ["a", "b", "d"], "back on the roster, as in an undisturbed run"


def test_a_run_that_goes_on_waits_for_all_it_had(world: World) -> None:
    # c contributed nothing to the last round, and connects again three seconds after the others.
    world.line.online = lambda: list("abc") if world.now >= 3 else list("ab")
    sites = world.federation()
    record = Record(contributors=["a"], sites={"a": SiteRecord()})
    standing = Standing(4, np.zeros(1, np.float32), {}, "", record)
    sites.gather(_awaited(Left(tuple("abc"), frozenset("bc")), standing))
    assert world.now == 3.0
    assert list(sites.sites()) == ["a", "b", "c"]


def test_a_run_that_finished_no_round_waits_for_everybody(world: World) -> None:
    standing = Standing(0, np.zeros(1, np.float32), {}, "")
    assert not _awaited(Left(tuple("abc"), frozenset("a")), standing)
    assert not _awaited(None, standing)


def test_whom_a_run_had_is_read_from_its_events(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "test", "conf: true\n")
    assert left(folder) is None
    log = EventLog(folder.events)
    log.emit("sites.awaited", sites=["a"], agreed=[])
    assert left(folder) is None
    log.emit("run.started", sites=["a", "b", "c"])
    for name, event in [("a", "agreed"), ("b", "refused"), ("c", "agreed"), ("c", "refused")]:
        log.emit(f"site.{event}", site=name)
    log.emit("run.failed", code="LF5209")
    log.close()
    assert left(folder) == Left(("a", "b", "c"), frozenset("a"))

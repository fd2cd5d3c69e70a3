"""Rounds that are summed by secure aggregation: the sum is exact, or nothing is opened at all."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_fed.config.schema import AggregationFloor, SecureAggregation
from lepton_fed.core.exchange import PhaseAsk, PhaseReply, ask_digest
from lepton_fed.errors import Problem
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.masked_plan import context_of, roster_digest
from lepton_fed.privacy.secagg import keys
from lepton_fed.privacy.secagg.member import Member, Rules
from lepton_fed.privacy.secagg.messages import Advert, Cohort, Envelope
from lepton_fed.privacy.secagg.requests import (
    AdvertReply,
    RevealReply,
    RevealRequest,
    ShareReply,
    ShareRequest,
    packed_body,
    read_body,
)
from lepton_fed.runs import files
from lepton_fed.runs.events import EventLog
from tests.unit.server.masked_world import (
    PHASES,
    SHAPE,
    Answer,
    Fault,
    Line,
    MaskedWorld,
    doubled,
    failing,
    garbled,
    lost,
    refusing,
    silent,
)

FAULTS: Mapping[str, Fault] = {
    "silent": silent,
    "lost": lost,
    "doubled": doubled,
    "refusing": refusing,
    "empty": garbled(b""),
    "no text": garbled(b"\xff\x00"),
    "another reply": garbled(packed_body(AdvertReply({"name": "x"}))),
    "a table": garbled(b'{"advert": {}, "envelopes": [], "confirmation": {}, "shares": {}}'),
    "deep": garbled(b"[" * 100_000),
}
HARMLESS = ("doubled",)
SIZES = st.sampled_from([3, 4, 5, 3, 4, 5, 3, 6, 7, 9])  # the small ones more often: they are fast


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing: what is on disk, and when, is tried where a process is killed."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


@pytest.fixture
def world(tmp_path: Path) -> MaskedWorld:
    return MaskedWorld(tmp_path)


def test_the_sum_is_that_of_all_sites(world: MaskedWorld) -> None:
    line = Line(world)
    (group,) = world.sums(line)
    assert (group.number, group.names) == (1, tuple("abcde"))
    world.require_sum(group)
    assert set(world.answered.values()) == {1}
    assert [asked.phase for name, asked in line.asked if name == "a"] == list(PHASES)
    packed = next(r.masked for a, r in line.left if a.phase == "mask")
    assert packed is not None
    assert group.sent_bytes == packed.size


@pytest.mark.parametrize("bits", [20, 32, 64])
@pytest.mark.parametrize("post_quantum", [False, True])
def test_the_sum_is_exact_in_every_ring(tmp_path: Path, bits: int, post_quantum: bool) -> None:
    secure = SecureAggregation(enabled=True, bits=bits, post_quantum=post_quantum)
    world = MaskedWorld(tmp_path, secure=secure, on_disk=True)
    line = Line(world, failing({("b", "mask"): silent}))
    (group,) = world.sums(line)
    assert group.names == tuple("acde")
    world.require_sum(group)


def test_no_vector_leaves_as_it_is(world: MaskedWorld) -> None:
    line = Line(world)
    world.sums(line)
    seen: set[bytes] = set()
    for asked, reply in line.left:
        if asked.phase == "mask":
            assert reply.masked is not None
            masked = reply.masked[:].tobytes()
            plain = world.encoded(reply.site, world.ask()).astype(np.uint32).tobytes()
            same = sum(a == b for a, b in zip(plain, masked, strict=True))
            assert same < len(plain) / 4
            seen.add(masked)
        else:
            assert reply.masked is None
            assert "LF" not in reply.body.decode()
    assert len(seen) == 5


def test_keys_of_the_next_round_ride_on_the_last_message_of_this_one(world: MaskedWorld) -> None:
    """Four trips a round once the first is over, and none for a round that will not come."""
    log = EventLog(world.folder.events)
    masked = world.masked(log)
    for number, train, trips in ((1, True, PHASES), (2, True, PHASES[1:]), (3, True, PHASES[1:]),
                                 (3, False, PHASES[1:])):  # fmt: skip
        line, ask = Line(world), world.ask(number, train=train)
        (group,) = masked.sums(line, ask, world.names, None, lambda _: None)
        world.require_sum(group, ask)
        assert [asked.phase for name, asked in line.asked if name == "a"] == list(trips)
        reveals = [read_body(RevealRequest, a.body) for _, a in line.asked if a.phase == "reveal"]
        assert {request.advert for request in reveals} == {train}
        masked.forget()
    log.close()
    assert not list(world.folder.masked.iterdir())


def test_the_model_goes_out_with_the_phase_that_trains_alone(world: MaskedWorld) -> None:
    line = Line(world)
    world.sums(line)
    for _, asked in line.asked:
        assert bool(asked.ask.vectors) == (asked.phase == "share")


def test_who_has_trained_is_told_once_each(world: MaskedWorld) -> None:
    told: list[str] = []
    log = EventLog(world.folder.events)
    line = Line(world, failing({("b", "share"): doubled, ("c", "share"): silent}))
    world.masked(log).sums(line, world.ask(), world.names, None, told.append)
    log.close()
    assert told == ["a", "b", "d", "e"]


def test_what_is_planned_is_written_down(world: MaskedWorld) -> None:
    log = EventLog(world.folder.events)
    world.masked(log).tell(evaluate=True)
    log.close()
    (event,) = world.events("secagg.planned")
    layout = world.layout(world.ask())
    assert (event["bits"], event["words"], event["cohort"]) == (32, layout.words, 5)
    assert event["bytes"] == 4 * layout.words
    assert event["most_bits_lost_to_weight"] == pytest.approx(np.log2(20), abs=0.05)
    assert "malicious site" in event["unchecked"]


# --- whoever drops out, whatever comes


def check(world: MaskedWorld, line: Line, sums: list[Any]) -> None:
    """Assert that a sum is exact and of whom it says, or that nothing came that opens one."""
    assert all(calls == 1 for calls in world.answered.values())
    attempts = {asked.attempt for asked, reply in line.left if asked.phase == "reveal"}
    assert len(attempts) <= 1, "shares of two attempts left"
    if sums:
        (group,) = sums
        (attempt,) = attempts
        came = {
            reply.site
            for asked, reply in line.heard
            if asked.phase == "mask" and asked.attempt == attempt
            and reply.masked is not None and reply.site in world.names
        }  # fmt: skip
        assert set(group.names) == came
        world.require_sum(group)
        return
    threshold = Rules(3, 2 / 3).least(len(world.names))
    formed = world.events("secagg.formed")
    threshold = max([event["threshold"] for event in formed], default=threshold)
    shares = [
        reply.site
        for asked, reply in line.heard
        if asked.phase == "reveal" and reply.refusal is None and b'"seeds"' in reply.body
        and reply.site in world.names
    ]  # fmt: skip
    assert len(set(shares)) < threshold


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_whatever_happens_the_sum_is_exact_or_nothing_is_opened(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = [f"site-{number}" for number in range(data.draw(SIZES))]
    where = st.tuples(st.integers(1, 2), st.sampled_from(PHASES), st.sampled_from(names))
    faults = data.draw(st.dictionaries(where, st.sampled_from(sorted(FAULTS)), max_size=6))
    chance = random.Random(data.draw(st.integers(0, 2**32)))  # noqa: S311 - an order of replies

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        kind = faults.get((asked.attempt, asked.phase, name))
        return FAULTS[kind](name, asked, answer) if kind else [answer()]

    world = MaskedWorld(tmp_path_factory.mktemp("fuzz"), names)
    line = Line(world, fault, lambda asked: chance.sample(asked, len(asked)))
    sums = world.sums(line)
    check(world, line, sums)
    if all(kind in HARMLESS for kind in faults.values()):
        assert sums
        assert sums[0].names == tuple(names)


@pytest.mark.parametrize("kind", sorted(FAULTS))
@pytest.mark.parametrize("phase", PHASES)
def test_one_site_of_five_may_fail_anywhere_and_anyhow(
    tmp_path: Path, phase: str, kind: str
) -> None:
    world = MaskedWorld(tmp_path, on_disk=kind == "lost")
    line = Line(world, failing({("c", phase): FAULTS[kind]}), order=lambda n: n[::-1])
    sums = world.sums(line)
    check(world, line, sums)
    (group,) = sums
    in_sum = kind in HARMLESS or phase in ("confirm", "reveal")
    assert ("c" in group.names) == in_sum
    codes = {"doubled": {("c", "LF4410"), ("not-c", "LF4407")}, "refusing": {("c", "LF4605")}}
    named = set() if kind in ("silent", "lost") else {("c", "LF4415")}
    # Who is asked for shares without having confirmed says so.
    unconfirmed = {("c", "LF4514")} if phase == "confirm" else set()
    assert set(world.refusals()) - unconfirmed == codes.get(kind, named)


@pytest.mark.parametrize("phase", PHASES)
def test_with_too_few_sites_nothing_is_revealed(tmp_path: Path, phase: str) -> None:
    world = MaskedWorld(tmp_path)
    line = Line(world, failing(dict.fromkeys([("a", phase), ("b", phase), ("c", phase)], silent)))
    assert world.sums(line) == []
    assert line.came("reveal") == ([] if phase != "reveal" else ["d", "e"])
    assert world.events("secagg.opened") == []
    (event,) = world.events("secagg.abandoned")
    assert (event["phase"], event["attempt"]) == (phase, 1)


def test_a_cohort_below_the_smallest_is_not_asked_for_more_than_keys(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path)
    line = Line(world)
    assert world.sums(line, cohort=["a", "b"]) == []
    assert {asked.phase for _, asked in line.asked} <= {"advertise"}
    assert len(world.events("secagg.abandoned")) == 1


def test_below_the_quorum_nothing_is_revealed(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, quorum=5)
    line = Line(world, failing({("c", "mask"): lost}))
    assert world.sums(line) == []
    assert (line.came("confirm"), line.came("reveal")) == ([], [])
    (event,) = world.events("secagg.abandoned")
    assert event["why"] == "4 sites are left, the quorum is 5"


def test_a_round_that_failed_costs_the_next_one_nothing(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, rounds=8)
    for at, phase in enumerate(PHASES[1:]):
        gone = failing(dict.fromkeys([("a", phase), ("b", phase), ("c", phase)], lost))
        assert world.sums(Line(world, gone), world.ask(2 * at + 1)) == []
        (group,) = world.sums(Line(world), world.ask(2 * at + 2))
        world.require_sum(group, world.ask(2 * at + 2))
        assert group.names == tuple("abcde")


# --- who sends something false


def resigned_share(world: MaskedWorld, cheat: str) -> Fault:
    """The site gives everybody a share that is not the one it committed to, rightly signed."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name != cheat or asked.phase != "share" or asked.attempt > 1:
            return [reply]
        cohort = cohort_of(world, asked)
        made = [Envelope.parse(e) for e in read_body(ShareReply, reply.body).envelopes]
        false = [replace(e, seed_share=bytes(32)).signed(cohort, world.identities[cheat])
                 for e in made]  # fmt: skip
        return [replace(reply, body=packed_body(ShareReply([e.wire() for e in false])))]

    return fault


def cohort_of(world: MaskedWorld, asked: PhaseAsk) -> Cohort:
    request = read_body(ShareRequest, asked.body)
    return Cohort(
        context_for(world, asked),
        tuple(map(Advert.parse, request.adverts)),
        request.threshold,
        subject=ask_digest(asked.ask),
    )


def context_for(world: MaskedWorld, asked: PhaseAsk) -> Any:
    return context_of(
        world.agreement,
        SHAPE,
        world.layout(asked.ask),
        roster_digest(world.roster),
        serial=asked.ask.round_number,
        attempt=asked.attempt,
    )


def test_after_a_false_share_the_others_mask_the_same_vectors_again(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, on_disk=True)
    line = Line(world, resigned_share(world, "b"))
    (group,) = world.sums(line)
    assert group.names == tuple("acde")
    world.require_sum(group)
    assert set(world.answered.values()) == {1}, "nothing is trained twice"
    formed = world.events("secagg.formed")
    assert [(e["attempt"], e["sites"], e["threshold"]) for e in formed] == [
        (1, list("abcde"), 4), (2, list("acde"), 4)
    ]  # fmt: skip
    assert {code for _, code in world.refusals()} == {"LF4514"}
    assert line.came("mask", 1) == ["b"], "who made it can use its own"


def test_the_names_of_those_who_sent_something_false_are_written_down(world: MaskedWorld) -> None:
    garbage = garbled(b"{}")
    line = Line(world, failing({("a", "advertise"): garbage, ("b", "confirm"): garbage}))
    (group,) = world.sums(line)
    assert set(world.refusals()) == {("a", "LF4415"), ("b", "LF4415")}
    assert group.names == tuple("bcde"), "the vector of b is in the sum, its word is not needed"


def test_after_a_false_confirmation_too_many_the_next_attempt_is_without_its_sender(
    world: MaskedWorld,
) -> None:
    line = Line(world, failing({("b", "confirm"): garbled(b"{}"), ("d", "confirm"): lost}))
    (group,) = world.sums(line)
    assert group.names == tuple("acde")
    world.require_sum(group)
    assert world.refusals() == [("b", "LF4415")]
    assert set(world.answered.values()) == {1}
    assert line.came("confirm", 1) == list("abcde")
    assert line.came("reveal", 1) == []


def accusing(accusers: str, accused: str, phase: str = "mask") -> Fault:
    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name in accusers and asked.phase == phase and asked.attempt == 1:
            problem = Problem("LF4514", "its share is not the one it committed to")
            return [PhaseReply(name, refusal=problem, accused=accused)]
        return [reply]

    return fault


def test_on_one_sites_word_against_another_both_are_left_out(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    fault = both(accusing("a", "b"), failing(dict.fromkeys([("c", "mask"), ("d", "mask")], silent)))
    (group,) = world.sums(Line(world, fault))
    assert group.names == tuple("cdef")
    world.require_sum(group)


def test_on_the_word_of_two_the_accused_is_left_out_alone(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    fault = both(accusing("ac", "b"), failing({("d", "mask"): silent}))
    (group,) = world.sums(Line(world, fault))
    assert group.names == tuple("acdef")
    world.require_sum(group)


@pytest.mark.parametrize("phase", ["share", "mask"])
def test_whom_two_accuse_is_not_in_the_sum_and_they_are_though_enough_were_left(
    tmp_path: Path, phase: str
) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"), on_disk=True)
    line = Line(world, accusing("ac", "b", phase))
    (group,) = world.sums(line)
    assert group.names == tuple("acdef")
    world.require_sum(group)
    assert set(world.answered.values()) == {1}, "they mask their stored vectors again"
    assert line.came("confirm", 1) == [], "nothing was confirmed of the first sum, or revealed"
    (event,) = world.events("secagg.abandoned")
    assert (event["attempt"], event["phase"]) == (1, "mask")
    assert event["why"] == "two sites or more accuse b"
    assert [e["sites"] for e in world.events("secagg.formed")] == [list("abcdef"), list("acdef")]


def test_on_the_word_of_one_the_attempt_goes_on_without_the_accuser(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    line = Line(world, accusing("a", "b"))
    (group,) = world.sums(line)
    assert group.names == tuple("bcdef")
    world.require_sum(group)
    assert {asked.attempt for _, asked in line.asked} == {1}


def test_two_who_accuse_two_are_heard_one_at_a_time(tmp_path: Path) -> None:
    """One word against another each: as with one accuser, they leave and the attempt goes on."""
    world = MaskedWorld(tmp_path, tuple("abcdefg"))
    fault = both(accusing("a", "b"), accusing("c", "d"))
    (group,) = world.sums(Line(world, fault))
    assert group.names == tuple("bdefg")
    world.require_sum(group)


def test_a_pair_that_always_lies_throws_one_site_out_of_each_attempt_but_the_last(
    tmp_path: Path,
) -> None:
    """It cannot stop the round: in the last attempt there is no other to be made."""
    world = MaskedWorld(
        tmp_path,
        tuple("abcdefghij"),
        SecureAggregation(enabled=True, threshold=0.6),
        floor=AggregationFloor(threshold=0.6),
    )

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name in "ac" and asked.phase == "mask":
            problem = Problem("LF4514", "its share is not the one it committed to")
            return [PhaseReply(name, refusal=problem, accused="bde"[asked.attempt - 1])]
        return [reply]

    line = Line(world, fault)
    (group,) = world.sums(line)
    assert group.names == tuple("efghij")
    world.require_sum(group)
    assert {asked.attempt for _, asked in line.asked} == {1, 2, 3}


def test_only_who_was_asked_accuses_once_and_of_what_it_was_sent(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    accused = PhaseReply("", refusal=Problem("LF4514", "false"), accused="b")

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if asked.phase == "mask":
            said = {
                "a": [reply, replace(accused, site="a")],  # after an answer
                "c": [replace(accused, site=n) for n in ("c", "c", "zoe", "not-c")],
                "b": [reply],
            }
            return said.get(name, [reply])
        return [reply]

    line = Line(world, fault)
    (group,) = world.sums(line)
    assert group.names == tuple("abdef")
    world.require_sum(group)
    assert {asked.attempt for _, asked in line.asked} == {1}


def test_on_the_coordinators_own_word_nobody_accuses_another(tmp_path: Path) -> None:
    """What a site confirms or opens is said by the coordinator alone."""
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    accusers = accusing("de", "b", "confirm")
    (group,) = world.sums(Line(world, both(accusers, failing({("a", "confirm"): garbled(b"{}")}))))
    assert group.names == tuple("bcdef")
    world.require_sum(group)


def test_who_accuses_itself_or_one_that_is_not_in_the_cohort_accuses_nobody(
    tmp_path: Path,
) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    fault = both(accusing("a", "a"), accusing("c", "zoe"))
    line = Line(world, fault)
    (group,) = world.sums(line)
    assert group.names == tuple("bdef")
    world.require_sum(group)


def test_a_secret_wrapped_falsely_is_named_when_its_maker_drops_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who got it cannot tell; the coordinator can, and too late for the round."""
    world = MaskedWorld(tmp_path, secure=SecureAggregation(enabled=True, post_quantum=True))
    right, lying = keys._pair_secret, []

    def pair_secret(*about: Any) -> bytearray:
        return bytearray(32) if lying else right(*about)

    monkeypatch.setattr(keys, "_pair_secret", pair_secret)

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        if name == "b" and asked.phase == "mask":
            return []
        lying.extend([name] * (name == "b"))
        reply = answer()
        lying.clear()
        return [reply]

    line = Line(world, fault)
    assert world.sums(line) == []
    assert line.came("mask") == list("acde"), "nobody else noticed"
    assert world.refusals() == [("b", "LF4415")]
    assert world.events("secagg.opened") == []


def test_an_attempt_that_ends_with_its_adverts_is_made_again_under_its_number(
    tmp_path: Path,
) -> None:
    """A coordinator that is restarted in it begins there too, and sites do not go back."""
    world = MaskedWorld(tmp_path, on_disk=True)
    asked_before: set[str] = set()

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if asked.phase != "advertise" or name in asked_before or name in "ab":
            return [reply]
        asked_before.add(name)
        return [replace(reply, body=b"{}")] if name == "c" else []

    line = Line(world, fault)
    (group,) = world.sums(line)
    assert group.names == tuple("abde")
    world.require_sum(group)
    assert {asked.attempt for _, asked in line.asked} == {1}
    assert [e["phase"] for e in world.events("secagg.abandoned")] == ["advertise"]


def test_an_accusation_of_a_stranger_changes_nothing_for_the_others(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abcdef"))
    (group,) = world.sums(Line(world, accusing("a", "zoe")))
    assert group.names == tuple("bcdef")
    world.require_sum(group)


def both(one: Fault, other: Fault) -> Fault:
    """Return what comes of two faults, one after the other."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        for reply in one(name, asked, answer):
            yield from other(name, asked, lambda reply=reply: reply)  # type: ignore[misc]

    return fault


def test_two_sites_with_one_key_cannot_keep_a_round_from_being_made(world: MaskedWorld) -> None:
    """They work together: each advert is signed by its own site, and the cohort is none."""
    theirs = Member("a", world.identities["a"], world.roster, Rules(3, 2 / 3))

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        if asked.phase != "advertise" or name not in "ab":
            return [answer()]
        context = context_for(world, asked)
        advert = replace(theirs.advertise(context), name=name)
        wire = advert.signed(context, world.identities[name]).wire()
        return [PhaseReply(name, packed_body(AdvertReply(wire)))]

    (group,) = world.sums(Line(world, fault))
    assert group.names == tuple("cde"), "b is refused; a, which is honest here, knows no such key"
    world.require_sum(group)
    assert world.refusals() == [("b", "LF4415"), ("a", "LF4514")]


def test_a_site_that_reveals_shares_of_its_own_making_is_named(world: MaskedWorld) -> None:
    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name != "b" or asked.phase != "reveal":
            return [reply]
        said = read_body(RevealReply, reply.body)
        said.shares["seeds"]["a"] = "00" * 33
        return [replace(reply, body=packed_body(said))]

    (group,) = world.sums(Line(world, fault))
    world.require_sum(group)
    assert world.refusals() == [("b", "LF4415")]


@pytest.mark.parametrize("wrong", ["none", "short", "long", "twice as wide"])
def test_a_masked_vector_of_another_length_is_named_and_not_added(
    world: MaskedWorld, wrong: str
) -> None:
    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name != "b" or asked.phase != "mask":
            return [reply]
        assert reply.masked is not None
        packed = reply.masked[:]
        others = {
            "none": None,
            "short": packed[:-1],
            "long": np.append(packed, packed[:1]),
            "twice as wide": np.repeat(packed, 2),
        }
        return [replace(reply, masked=others[wrong])]

    (group,) = world.sums(Line(world, fault))
    assert group.names == tuple("acde")
    world.require_sum(group)
    assert world.refusals() == [("b", "LF4415")]


def test_a_sum_that_no_sites_can_have_made_is_abandoned_and_not_used(world: MaskedWorld) -> None:
    """A site masks what it likes; the witness at the end of the vector shows the clumsy ones."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        reply = answer()
        if name != "b" or asked.phase != "mask":
            return [reply]
        assert reply.masked is not None
        words = reply.masked[:].view(np.uint32).copy()
        words[-1] -= 1
        return [replace(reply, masked=words.view(np.uint8))]

    assert world.sums(Line(world, fault)) == []
    (event,) = world.events("secagg.abandoned")
    assert event["why"].startswith("no sum of vectors as sites make them: 4 of weight ")


def test_a_coordinator_with_another_roster_gets_nothing(world: MaskedWorld) -> None:
    line = Line(world)
    pinned = dict(world.roster)
    log = EventLog(world.folder.events)
    masked = world.masked(log)
    masked._keys = lambda: {**pinned, "zoe": PrivateKey.generate().public_key()}
    assert masked.sums(line, world.ask(), world.names, None, lambda _: None) == []
    log.close()
    assert {code for _, code in world.refusals()} == {"LF4515"}
    assert line.came("advertise") == []


def test_once_shares_were_asked_for_a_round_is_not_made_again(world: MaskedWorld) -> None:
    """Some are out already; those who gave them would refuse."""
    false = garbled(packed_body(RevealReply({"seeds": {}, "masks": {}})))
    line = Line(world, failing({("b", "reveal"): false, ("d", "reveal"): lost}))
    assert world.sums(line) == []
    assert ("b", "LF4415") in world.refusals()
    assert {asked.attempt for _, asked in line.asked} == {1}
    assert len(world.events("secagg.abandoned")) == 1

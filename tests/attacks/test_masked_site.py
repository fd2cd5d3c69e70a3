"""A coordinator that lies to sites in a masked run, in what really travels: phases, their bodies.

The sites are those of a run, but for training, with their files; each is started anew for every
request, as after kill -9. What the coordinator must never get of a site: a share on too few or
other confirmations, both kinds of share of anybody, a second masked vector of a round, or anything
in the clear. Numbers in a test's name are those of what was found wrong with another protocol:
1 weak generators, 2 masks that are not uniform, 3 both shares of a site, 4 lists with repetitions,
5 the coordinator's threshold, 6 unsigned keys, 7 split views, 8 the same update in several sums,
9 numbers in the clear, 10 secrets that stay, 12 false shares, 13 words and weights that do not fit,
15 whose neighbours the coordinator picks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.clients.vault import FileVault, Remembered
from lepton_fed.config.schema import AggregationFloor, SecureAggregation
from lepton_fed.core.exchange import MODEL, Ask, PhaseAsk, Reply
from lepton_fed.errors import Problem
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.masked_plan import context_of, roster_digest
from lepton_fed.privacy.secagg.member import Member, Rules
from lepton_fed.privacy.secagg.requests import (
    AdvertRequest,
    ConfirmReply,
    MaskRequest,
    RevealReply,
    ShareReply,
    ShareRequest,
    read_body,
)
from lepton_fed.runs import files
from tests.attacks.masked_coordinator import NAMES, THRESHOLD, VICTIM, Liar
from tests.unit.server.masked_world import SHAPE, MaskedWorld


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing: the order of syncs and answers is tried in tests/unit/clients/test_vault.py."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


def made(folder: Path, **changes: Any) -> MaskedWorld:
    return MaskedWorld(folder, NAMES, on_disk=True, **changes)


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    """Give a coordinator at the beginning of a round, and look afterwards what it has got."""
    found = Liar(made(tmp_path))
    yield found
    found.require_nothing_twice()


# --- who takes part


def test_6_15_invented_sites_and_another_roster_get_nothing(liar: Liar) -> None:
    liar.to_adverts()
    known = liar.digest
    liar.digest = roster_digest({**liar.world.roster, "zoe": PrivateKey.generate().public_key()})
    for phase, request in (
        ("advertise", AdvertRequest(liar.digest)),
        ("share", liar.share()),
        ("mask", MaskRequest(liar.digest, [], list(NAMES))),
        ("confirm", liar.confirm()),
        ("reveal", liar.reveal()),
    ):
        liar.refused(VICTIM, liar.asked(phase, request), "LF4515")
    liar.digest = known
    context = context_of(
        liar.world.agreement, SHAPE, liar.world.layout(liar.world.ask()), known, serial=1, attempt=1
    )
    rules = Rules(3, 2 / 3)
    for name in ("zoe", "b"):  # one that nobody pinned, and keys of its own for one that all did
        forged = Member(name, PrivateKey.generate(), {}, rules).advertise(context).wire()
        adverts = {**liar.adverts, name: forged}
        if name == "zoe":
            del adverts["f"]
        request = ShareRequest(liar.digest, [adverts[n] for n in sorted(adverts)], THRESHOLD)
        said = liar.refused(VICTIM, liar.asked("share", request))
        assert "not on the roster" in said or "not signed by it" in said
    assert liar.world.answered.total() == 0, "nothing was trained for any of it"


def test_a_cohort_larger_than_agreed_is_refused(tmp_path: Path) -> None:
    """How fine a masked number is follows from the cohort: with more of them a sum would wrap."""
    world = made(tmp_path)
    world.agreement = replace(world.agreement, cohort=5)
    liar = Liar(world)
    liar.to_adverts()
    assert "at most 5 were agreed to" in liar.refused(VICTIM, liar.asked("share", liar.share()))


@pytest.mark.parametrize("threshold", [-1, 0, 1, 2, 3, 7, 2**62])
def test_5_a_threshold_of_the_coordinators_choice_is_refused(liar: Liar, threshold: int) -> None:
    liar.to_adverts()
    said = liar.refused(VICTIM, liar.asked("share", liar.share(threshold=threshold)))
    assert "threshold" in said


def test_4_5_a_cohort_of_the_victim_or_of_one_site_many_times_is_refused(liar: Liar) -> None:
    liar.to_adverts()
    for names in (["a"], ["a", "b"], ["a", "b", "b", "b"], ["a"] * 4, ["b", "c", "d", "e"]):
        liar.refused(VICTIM, liar.asked("share", liar.share(names, len(names))))
    assert liar.world.answered.total() == 0


def test_the_owners_rules_hold_whatever_the_run_says(tmp_path: Path) -> None:
    """Both were compared when the site agreed; should that fail, the site's own still hold."""
    floor = AggregationFloor(min_cohort=6, threshold=0.9)
    liar = Liar(made(tmp_path, floor=floor))
    liar.to_adverts()
    assert "fewer than 6" in liar.refused(VICTIM, liar.asked("share", liar.share(NAMES[:5], 5)))
    assert "below 6" in liar.refused(VICTIM, liar.asked("share", liar.share(threshold=5)))


def test_8_another_cohort_in_the_same_attempt_is_refused(liar: Liar) -> None:
    liar.to_shares()
    for request in (liar.share(NAMES[:5]), liar.share(threshold=5), liar.share(NAMES[:4], 3)):
        assert "another share" in liar.refused(VICTIM, liar.asked("share", request))
    again = liar.send(VICTIM, liar.asked("share", liar.share()))
    assert read_body(ShareReply, again.body).envelopes == liar.envelopes[VICTIM]


# --- envelopes


def test_2_3_partial_delivery_of_envelopes_is_refused(liar: Liar) -> None:
    liar.to_shares()
    inbox = liar.inbox(VICTIM)
    for envelopes, senders in (
        (inbox[1:], NAMES),
        ([], NAMES),
        (inbox, NAMES[:4]),
        (inbox[:2], NAMES[:3]),
        (inbox[1:], ("a", *NAMES[2:], "b")),
        (inbox, NAMES[1:]),
        ([], ("a",)),
    ):
        request = MaskRequest(liar.digest, list(envelopes), list(senders))
        liar.refused(VICTIM, liar.asked("mask", request))


def test_12_swapped_edited_and_repeated_envelopes_are_refused(liar: Liar) -> None:
    liar.to_shares()
    inbox, other = liar.inbox(VICTIM), liar.inbox("b")
    edited = {**inbox[0], "sealed": inbox[0]["sealed"][:-2] + "00"}
    for envelopes in (
        [inbox[0], *other[1:]],
        [{**other[-1], "recipient": VICTIM}, *inbox[1:]],
        [edited, *inbox[1:]],
        [inbox[0], *inbox],
        [*inbox[::-1]],
        [{**inbox[0], "sender": "c"}, *inbox[1:]],
        [{}, *inbox[1:]],
        [{**inbox[0], "sealed": "no"}, *inbox[1:]],
    ):
        request = MaskRequest(liar.digest, envelopes, list(NAMES))
        liar.refused(VICTIM, liar.asked("mask", request))


def test_a_second_masked_vector_of_an_attempt_does_not_leave(liar: Liar) -> None:
    liar.to_masks()
    first = liar.masked[VICTIM]
    others = list(NAMES[:5])
    request = MaskRequest(liar.digest, liar.inbox(VICTIM, others), others)
    assert "another mask" in liar.refused(VICTIM, liar.asked("mask", request))
    liar.send(VICTIM, liar.asked("mask", liar.mask(VICTIM)))
    assert liar.masked[VICTIM] == first


# --- the sum


def test_nothing_is_revealed_before_it_is_confirmed(liar: Liar) -> None:
    liar.to_masks()
    assert "comes after" in liar.refused(VICTIM, liar.asked("reveal", liar.reveal()))
    for name in NAMES[1:]:
        reply = liar.send(name, liar.asked("confirm", liar.confirm()))
        liar.confirmations[name] = read_body(ConfirmReply, reply.body).confirmation
    assert "comes after" in liar.refused(VICTIM, liar.asked("reveal", liar.reveal()))


def test_phases_that_are_left_out_are_refused(liar: Liar) -> None:
    liar.to_adverts()
    for phase, request in (
        ("mask", MaskRequest(liar.digest, [], list(NAMES))),
        ("confirm", liar.confirm()),
        ("reveal", liar.reveal(signed=[])),
    ):
        # For the first there is no vector either.
        code = "LF4517" if phase == "mask" else "LF4514"
        liar.refused(VICTIM, liar.asked(phase, request), code)
    liar.to_shares()
    assert "comes after" in liar.refused(VICTIM, liar.asked("confirm", liar.confirm()))


@pytest.mark.parametrize(
    "survivors",
    [["a"], ["a"] * 6, ["a", "a", "b", "c"], ["a", "b", "c"], ["b", "c", "d", "e"],
     ["a", "b", "c", "zoe"], ["d", "c", "b", "a"], []],
)  # fmt: skip
def test_4_survivors_that_are_no_list_of_enough_sites_are_not_confirmed(
    liar: Liar, survivors: list[str]
) -> None:
    liar.to_masks()
    liar.refused(VICTIM, liar.asked("confirm", liar.confirm(survivors)))


def test_3_nobody_gives_both_kinds_of_share(liar: Liar) -> None:
    survivors = NAMES[:5]
    liar.to_confirmations(survivors)
    for lists in (
        (survivors, ["b", "f"]),
        (survivors, []),
        (survivors, ["f", "f"]),
        (NAMES, []),
        (NAMES, ["f"]),
        (survivors[:4], ["e", "f"]),
        (survivors, ["zoe"]),
    ):
        liar.refused(VICTIM, liar.asked("reveal", liar.reveal(*lists)))
    reply = liar.send(VICTIM, liar.asked("reveal", liar.reveal(survivors, ["f"])))
    shares = read_body(RevealReply, reply.body).shares
    assert (sorted(shares["seeds"]), sorted(shares["masks"])) == (list(survivors), ["f"])


def test_7_split_views_open_nothing(liar: Liar) -> None:
    liar.to_masks()
    one, two = list(NAMES[:5]), [*NAMES[:4], "f"]
    signed = []
    for names, survivors in (("abe", one), ("cdf", two)):
        for name in names:
            reply = liar.send(name, liar.asked("confirm", liar.confirm(survivors)))
            signed.append(read_body(ConfirmReply, reply.body).confirmation)
    for name, survivors, dropped in (("a", one, ["f"]), ("c", two, ["e"])):
        request = liar.reveal(survivors, dropped, signed)
        assert "3 sites confirmed" in liar.refused(name, liar.asked("reveal", request))
    other = liar.reveal(two, ["e"], signed)
    assert "other survivors" in liar.refused(VICTIM, liar.asked("reveal", other))
    assert liar.shares == {}


def test_4_6_repeated_forged_and_renamed_confirmations_do_not_count(liar: Liar) -> None:
    liar.to_confirmations()
    own = liar.confirmations[VICTIM]
    forged = [{"name": name, "signature": "00" * 64} for name in NAMES]
    for signed in ([], [own] * 9, [{**own, "name": n} for n in NAMES], [own, *forged]):
        liar.refused(VICTIM, liar.asked("reveal", liar.reveal(signed=signed)))


def test_8_a_second_reveal_with_other_lists_is_refused(liar: Liar) -> None:
    liar.to_the_end()
    for lists in ((NAMES, []), (NAMES[:4], ["e", "f"]), (NAMES[:5], [])):
        liar.refused(VICTIM, liar.asked("reveal", liar.reveal(*lists)))
    liar.send(VICTIM, liar.asked("reveal", liar.reveal(NAMES[:5], ["f"])))  # the same again


@pytest.mark.parametrize("attempt", [1, 2, 16])
def test_8_a_round_that_was_opened_is_closed_in_every_attempt(liar: Liar, attempt: int) -> None:
    liar.to_the_end()
    asked = liar.asked("advertise", AdvertRequest(liar.digest), attempt=attempt)
    assert "closed" in liar.refused(VICTIM, asked)
    for phase, request in (
        ("share", liar.share()),
        ("mask", liar.mask(VICTIM)),
        ("confirm", liar.confirm(NAMES[:5])),
    ):
        code = "LF4517" if phase == "mask" else "LF4514"  # its vector is gone for good
        liar.refused(VICTIM, liar.asked(phase, request, attempt=attempt), code)


def test_messages_of_an_old_round_are_worth_nothing_in_another(liar: Liar) -> None:
    old = liar.to_the_end()
    new = Liar(old.world).to_adverts(2)
    replayed = ShareRequest(
        old.digest, [new.adverts["a"], *[old.adverts[n] for n in NAMES[1:]]], THRESHOLD
    )
    assert "not signed by it for this round" in new.refused(VICTIM, new.asked("share", replayed, 2))
    new.to_shares(2)
    mixed = [old.inbox(VICTIM)[0], *new.inbox(VICTIM)[1:]]
    new.refused(VICTIM, new.asked("mask", MaskRequest(new.digest, mixed, list(NAMES)), 2))
    new.send(VICTIM, new.asked("mask", new.mask(VICTIM), 2))
    new.send(VICTIM, new.asked("confirm", new.confirm(NAMES[:5]), 2))
    stale = new.reveal(NAMES[:5], ["f"], list(old.confirmations.values()))
    assert "0 sites confirmed" in new.refused(VICTIM, new.asked("reveal", stale, 2))
    assert new.shares == {}
    assert new.masked[VICTIM] != old.masked[VICTIM]


# --- a second attempt


def test_a_second_attempt_masks_the_same_vector_for_fewer_and_never_for_others(
    liar: Liar,
) -> None:
    liar.to_masks()
    second = Liar(liar.world).to_adverts(attempt=2)
    lower = second.share(NAMES[:4], 3)
    assert "lower threshold" in second.refused(VICTIM, second.asked("share", lower, attempt=2))
    reply = second.send(VICTIM, second.asked("share", second.share(NAMES[:5]), attempt=2))
    assert reply.refusal is None
    third = Liar(liar.world).to_adverts(attempt=3)
    first = third.share(NAMES[1:5], 4)
    third.refused(VICTIM, third.asked("share", first, attempt=3))
    third.refused(VICTIM, third.asked("mask", liar.mask(VICTIM)))  # of the first attempt
    assert liar.world.answered[VICTIM, 1, True] == 1, "the stored vector is masked, none is trained"


def test_an_attempt_that_lies_behind_is_refused(liar: Liar) -> None:
    liar.to_shares(attempt=5)
    for attempt in (1, 4):
        asked = liar.asked("advertise", AdvertRequest(liar.digest), attempt=attempt)
        assert "lies behind" in liar.refused(VICTIM, asked)


def test_adverts_go_forward_alone_and_the_same_request_gets_the_same(liar: Liar) -> None:
    liar.to_shares()

    def advert(number: int, attempt: int) -> PhaseAsk:
        return liar.asked("advertise", AdvertRequest(liar.digest), number, attempt)

    first = liar.send(VICTIM, advert(2, 2)).body
    for number, attempt in ((1, 2), (1, 16), (2, 1)):
        assert "lies behind" in liar.refused(VICTIM, advert(number, attempt))
    assert liar.send(VICTIM, advert(2, 2)).body == first
    assert liar.send(VICTIM, liar.asked("mask", liar.mask(VICTIM))).refusal is None, "it goes on"
    own = liar.send(VICTIM, advert(1, 1)).body
    assert own == liar.send(VICTIM, advert(1, 1)).body
    assert vault_of(liar).recall().member.coming.round_number == 2, "nothing was lowered"
    liar.to_shares(2, 2)
    assert vault_of(liar).recall().member.round_number == 2
    assert liar.send(VICTIM, advert(2, 3)).refusal is None


def test_a_share_for_which_no_advert_was_given_leaves_nothing_behind(liar: Liar) -> None:
    liar.to_adverts()
    asked = liar.asked("share", liar.share(), attempt=2)
    before = vault_of(liar).recall()
    assert "has given no advert" in liar.refused(VICTIM, asked)
    assert vault_of(liar).recall() == before
    assert liar.send(VICTIM, liar.asked("share", liar.share())).refusal is None


def test_a_kill_between_vector_and_state_locks_nobody_out(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Led back to an earlier attempt the site would take its own vector for one it forgot."""
    liar.to_shares()
    later = Liar(liar.world).to_adverts(2)
    asked = later.asked("share", later.share(), 2)
    with monkeypatch.context() as patch:
        patch.setattr(FileVault, "remember", killed)
        with pytest.raises(KeyboardInterrupt):
            later.send(VICTIM, asked)
    stored = vault_of(liar).stored()
    assert stored is not None
    assert stored.serial == 2
    back = liar.asked("advertise", AdvertRequest(liar.digest), attempt=2)
    assert "lies behind" in liar.refused(VICTIM, back)
    assert later.send(VICTIM, asked).refusal is None
    assert liar.world.answered[VICTIM, 2, True] == 1


def killed(*of: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("attempt", [-1, 0, 17, 1000, 2**63 - 1])
def test_attempts_at_a_round_are_few(liar: Liar, attempt: int) -> None:
    """Each is a new draw of who holds a site's secrets, in a cohort where not all do."""
    liar.to_shares()
    asked = liar.asked("advertise", AdvertRequest(liar.digest), attempt=attempt)
    assert "at most 16 attempts" in liar.refused(VICTIM, asked)


@pytest.mark.parametrize("changes", [{"model": 9.0}, {"evaluate": False}, {"limit_s": 5.0}])
def test_another_ask_in_a_second_attempt_gets_no_second_vector(
    liar: Liar, changes: dict[str, Any]
) -> None:
    liar.to_masks()
    if "model" in changes:
        changes = {"vectors": {MODEL: np.full(5, changes["model"], np.float32)}}
    second = Liar(liar.world).to_adverts(attempt=2, **changes)
    asked = second.asked("share", second.share(), attempt=2, **changes)
    if "limit_s" in changes:  # it is no part of what is asked
        assert second.send(VICTIM, asked).refusal is None
    else:
        second.refused(VICTIM, asked, "LF4506")


def test_another_evaluate_flag_within_an_attempt_gets_nothing(liar: Liar) -> None:
    liar.to_shares()
    liar.refused(VICTIM, liar.asked("mask", liar.mask(VICTIM), evaluate=False))
    liar.send(VICTIM, liar.asked("mask", liar.mask(VICTIM)))
    signed = liar.send(VICTIM, liar.asked("confirm", liar.confirm()))
    assert signed.refusal is None
    liar.refused(VICTIM, liar.asked("confirm", liar.confirm(), evaluate=False))
    liar.refused(VICTIM, liar.asked("reveal", liar.reveal(), evaluate=False))


# --- which rounds


def test_another_agreement_layout_or_round_is_refused(liar: Liar) -> None:
    request = AdvertRequest(liar.digest)
    for changes, code in (
        ({"agreement": "0" * 64}, "LF4501"),
        ({"layout": "0" * 64}, "LF4502"),
        ({"round_number": 0}, "LF4503"),
        ({"round_number": -3}, "LF4503"),
        ({"round_number": 4}, "LF4503"),  # the number of the last evaluation
        ({"round_number": 4, "train": False}, "LF4503"),
        ({"round_number": 2**63 - 1}, "LF4503"),
    ):
        liar.refused(VICTIM, liar.asked("advertise", request, **changes), code)


def test_after_the_last_evaluation_no_round_is_made(liar: Liar) -> None:
    """The coordinator may ask for it first; then the run is over."""
    liar.to_adverts(train=False)
    for name in NAMES:
        reply = liar.send(name, liar.asked("share", liar.share(), train=False))
        liar.envelopes[name] = read_body(ShareReply, reply.body).envelopes
    for name in NAMES:
        liar.send(name, liar.asked("mask", liar.mask(name), train=False))
    for name in NAMES:
        reply = liar.send(name, liar.asked("confirm", liar.confirm(), train=False))
        liar.confirmations[name] = read_body(ConfirmReply, reply.body).confirmation
    beyond = liar.asked("reveal", liar.reveal(advert=True), train=False)
    liar.refused(VICTIM, beyond, "LF4503")  # there is no next round to give keys for
    assert liar.send(VICTIM, liar.asked("reveal", liar.reveal(), train=False)).refusal is None
    assert "closed" in liar.refused(VICTIM, liar.asked("advertise", AdvertRequest(liar.digest), 3))


def test_8_more_rounds_in_an_hour_than_allowed_are_refused_after_a_restart_too(
    tmp_path: Path,
) -> None:
    world = made(tmp_path, rounds=9, floor=AggregationFloor(rounds_per_hour=2))
    for number, now in ((1, 0.0), (2, 1800.0)):
        world.now = now
        Liar(world).to_shares(number)
    again = Liar(world).to_adverts(2, 2)
    asked = again.asked("share", again.share(), 2, 2)
    assert again.send(VICTIM, asked).refusal is None, "an attempt is no other round"
    liar = Liar(world).to_adverts(3)
    for now in (1800.0, 3599.0, -1e9):  # a clock that was set back lets nobody in
        world.now = now
        liar.refused(VICTIM, liar.asked("share", liar.share(), 3), "LF4516")
    world.now = 3600.0
    assert liar.to_adverts(3).send(VICTIM, liar.asked("share", liar.share(), 3)).refusal is None
    none = Liar(made(tmp_path / "none", floor=AggregationFloor(rounds_per_hour=0))).to_adverts()
    none.refused(VICTIM, none.asked("share", none.share()), "LF4516")
    assert none.world.answered.total() == 0


def test_8_a_new_run_for_each_round_gets_no_more_rounds_in_an_hour(tmp_path: Path) -> None:
    world = made(tmp_path, floor=AggregationFloor(rounds_per_hour=2))
    world.now = 1000.0
    other = FileVault(tmp_path / "sites" / VICTIM, "another-run")
    other.remember(Remembered(begun=[900.0, 950.0]))
    liar = Liar(world).to_adverts()
    liar.refused(VICTIM, liar.asked("share", liar.share()), "LF4516")
    world.now = 900.0 + 3600.0
    assert liar.send(VICTIM, liar.asked("share", liar.share())).refusal is None


# --- the site's files


def vault_of(liar: Liar) -> FileVault:
    found = liar.world.vault(VICTIM)
    assert isinstance(found, FileVault)
    return found


def test_a_site_that_forgot_where_it_was_says_nothing_as_long_as_its_vector_is_there(
    liar: Liar,
) -> None:
    """Led by the hand it would make a second sum with the same vector."""
    liar.to_masks()
    (state,) = (liar.world.root / "sites" / VICTIM).glob("*.json")
    state.unlink()
    for attempt in (1, 2):
        asked = liar.asked("advertise", AdvertRequest(liar.digest), attempt=attempt)
        liar.refused(VICTIM, asked, "LF4517")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1, 2]", b'{"member": 1}'])
def test_where_a_site_cannot_read_what_it_revealed_it_says_nothing(
    liar: Liar, content: bytes
) -> None:
    liar.to_masks()
    (state,) = (liar.world.root / "sites" / VICTIM).glob("*.json")
    state.write_bytes(content)
    for phase, request in (
        ("advertise", AdvertRequest(liar.digest)),
        ("share", liar.share()),
        ("mask", liar.mask(VICTIM)),
        ("confirm", liar.confirm()),
    ):
        reply = liar.send(VICTIM, liar.asked(phase, request, 2))
        assert reply.refusal is not None
        assert (reply.refusal.code, reply.body, reply.masked) == ("LF4517", b"", None)
    assert state.read_bytes() == content, "what is there is left for a person"


@pytest.mark.parametrize("spoil", ["gone", "cut", "that of the round before"])
def test_a_stored_vector_that_is_not_the_rounds_is_not_sent(liar: Liar, spoil: str) -> None:
    liar.to_shares()
    (vector,) = (liar.world.root / "sites" / VICTIM).glob("*.safetensors")
    before = vector.read_bytes()
    later = Liar(liar.world).to_shares(2)
    if spoil == "gone":
        vector.unlink()
    else:
        vector.write_bytes(before if "before" in spoil else before[:-5])
    reply = later.send(VICTIM, later.asked("mask", later.mask(VICTIM), 2))
    assert reply.refusal is not None
    assert (reply.refusal.code, reply.body, reply.masked) == ("LF4517", b"", None)


def test_10_what_is_secret_of_a_round_is_gone_when_it_is_over(liar: Liar) -> None:
    liar.to_confirmations(NAMES[:5])
    before = vault_of(liar).recall().member
    asked = liar.asked("reveal", liar.reveal(NAMES[:5], ["f"]))
    assert liar.send(VICTIM, asked).refusal is None
    on_disk = b"".join(liar.memory(VICTIM).values()).decode()
    assert list(liar.memory(VICTIM)) == [f"{liar.world.agreement.digest}.json"]
    for secret in (*before.secrets, before.seed_shares["f"]):
        assert secret not in on_disk
    for name in NAMES[1:5]:
        assert before.mask_shares[name] not in on_disk


def test_10_a_kill_after_a_reveal_leaves_no_vector(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.to_confirmations(NAMES[:5])
    asked = liar.asked("reveal", liar.reveal(NAMES[:5], ["f"]))
    with monkeypatch.context() as patch:
        patch.setattr(FileVault, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            liar.send(VICTIM, asked)
    assert vault_of(liar).stored() is not None
    # Whatever it is asked for next, here for another phase of what is over.
    liar.send(VICTIM, liar.asked("confirm", liar.confirm(NAMES[:5])))
    assert vault_of(liar).stored() is None
    assert liar.send(VICTIM, asked).refusal is None


@pytest.mark.parametrize("attempt", [1, 2])
def test_8_without_its_vector_a_site_trains_no_other_for_the_round(
    liar: Liar, attempt: int
) -> None:
    liar.to_shares()
    again = Liar(liar.world).to_adverts(attempt=attempt)
    (vector,) = (liar.world.root / "sites" / VICTIM).glob("*.safetensors")
    vector.unlink()
    liar.refused(VICTIM, again.asked("share", again.share(), attempt=attempt), "LF4517")
    assert liar.world.answered[VICTIM, 1, True] == 1
    later = Liar(liar.world).to_shares(2)
    assert later.send(VICTIM, later.asked("mask", later.mask(VICTIM), 2)).refusal is None


def test_a_receipt_names_as_signers_only_who_signed(liar: Liar) -> None:
    liar.to_confirmations(NAMES[:5])
    forged = {"name": "zoe", "signature": "00" * 64}
    shown = [*list(liar.confirmations.values())[:4], forged]
    for signed in (shown, [forged], []):  # the same sum again, whatever comes with it
        reply = liar.send(VICTIM, liar.asked("reveal", liar.reveal(NAMES[:5], ["f"], signed)))
        assert reply.refusal is None
        assert reply.notes["signed by"] == "a, b, c, d"


# --- what travels


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "confirm", "reveal"])
@pytest.mark.parametrize(
    "body", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"roster": 1}', b'{"roster": NaN}']
)
def test_a_body_that_is_none_gets_a_refusal(liar: Liar, phase: Any, body: bytes) -> None:
    asked = PhaseAsk(phase, 1, body, liar.world.ask())
    assert "malformed" in liar.refused(VICTIM, asked)


def test_an_unknown_phase_gets_a_refusal(liar: Liar) -> None:
    liar.refused(VICTIM, liar.asked("unmask", AdvertRequest(liar.digest)))


def test_9_13_nothing_but_the_masked_vector_says_anything_of_the_rows(liar: Liar) -> None:
    """Weight, counts and norms are in it; 4 bytes a number, and no other message has an array."""
    ask = liar.world.ask()
    update = liar.world.update(VICTIM, ask)
    assert update.update is not None
    liar.to_adverts()
    for name in NAMES:
        reply = liar.send(name, liar.asked("share", liar.share()))
        liar.envelopes[name] = read_body(ShareReply, reply.body).envelopes
        assert reply.masked is None
        assert reply.norms == (0.0, 0.0)
    reply = liar.send(VICTIM, liar.asked("mask", liar.mask(VICTIM)))
    assert reply.body == b""
    assert reply.masked is not None
    assert reply.masked.size == reply.sent_bytes == 4 * reply.words
    plain = liar.world.encoded(VICTIM, ask).astype("<u4")
    found = np.frombuffer(reply.masked[:].tobytes(), "<u4")
    assert int((found == plain).sum()) <= 1


def test_1_2_two_attempts_mask_one_vector_with_masks_that_have_nothing_in_common(
    tmp_path: Path,
) -> None:
    """Nothing of one attempt's masks follows from another's; each word is uniform in its ring."""
    liar = Liar(made(tmp_path, secure=SecureAggregation(enabled=True, bits=64)))
    vectors = []
    for attempt in (1, 2, 3):
        one = Liar(liar.world).to_shares(attempt=attempt)
        reply = one.send(VICTIM, one.asked("mask", one.mask(VICTIM), attempt=attempt))
        assert reply.masked is not None
        vectors.append(np.frombuffer(reply.masked[:].tobytes(), "<u8"))
    assert len({word for vector in vectors for word in vector.tolist()}) == 3 * vectors[0].size
    assert liar.world.answered[VICTIM, 1, True] == 1


def test_a_site_that_cannot_train_masks_nothing(liar: Liar) -> None:
    liar.to_adverts()
    liar.world.update = no_update  # type: ignore[method-assign]
    liar.refused(VICTIM, liar.asked("share", liar.share()), "LF4605")
    liar.world.answered.clear()


def no_update(name: str, ask: Ask) -> Any:
    """Return what a site says outside its hours."""
    del ask
    return Reply(name, refusal=Problem("LF4605", "this site trains at other hours"))

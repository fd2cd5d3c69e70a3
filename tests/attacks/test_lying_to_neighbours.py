"""A coordinator that lies where each site has few holders: no site's vector or secrets come out.

As in test_lying_collector the sites are real, and the coordinator is whoever writes the test. Where
everybody holds shares of everybody, one threshold guards everything. Here the coordinator knows who
picked whom before it says who is there, so it can aim at the few around one site.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.graph import Graph
from lepton_fed.privacy.secagg.member import MaskKeys, Member, Rules, State
from lepton_fed.privacy.secagg.messages import (
    Advert,
    Cohort,
    Confirmation,
    Envelope,
    FalseMessage,
    Reveal,
)
from tests.unit.privacy.secagg.published import random_bytes

NAMES = tuple(f"site-{number:02}" for number in range(24))
VICTIM = NAMES[6]
DEGREE, HOLDERS = 10, 7  # seven of a site's eleven, itself among them
ROUND = Context("run", 5, 1, "roster", "task", "layout")


@dataclass
class World:
    """Sites whose memory is a file: each call is by a process that was started for it."""

    share: float = 2 / 3
    holders_needed: int = HOLDERS
    keys: dict[str, PrivateKey] = field(
        default_factory=lambda: {name: PrivateKey.generate() for name in NAMES}
    )
    files: dict[str, bytes] = field(default_factory=dict)
    adverts: list[Advert] = field(default_factory=list)
    made: dict[str, list[Envelope]] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        self.rules = Rules(3, self.share)
        self.threshold = self.rules.least(len(NAMES))

    def graph(self, sites: int, _: int) -> Graph:
        return Graph(sites, DEGREE, self.holders_needed)

    def state(self, name: str) -> State:
        return decode(State, strict_json(self.files[name])) if name in self.files else State()

    def call(self, name: str, phase: str, *request: object, context: Context = ROUND) -> Any:
        roster = {other: key.public_key() for other, key in self.keys.items()}
        self.calls += 1
        source = random_bytes(f"{name} {self.calls}")  # who picks whom is the same in every run
        member = Member(
            name, self.keys[name], roster, self.rules, self.state(name), source, self.graph
        )
        try:
            return getattr(member, phase)(context, *request)
        finally:
            self.files[name] = json.dumps(asdict(member.state)).encode()

    def refuses(self, name: str, phase: str, *request: object) -> str:
        """Assert that a site refuses, and remembers nothing new; return what it says."""
        before = self.files[name]
        with pytest.raises(FalseMessage) as refused:
            self.call(name, phase, *request)
        assert self.files[name] == before, "a refusal changes nothing"
        return str(refused.value)

    def to_shares(self, context: Context = ROUND) -> World:
        self.adverts = [self.call(name, "advertise", context=context) for name in NAMES]
        for name in NAMES:
            self.made[name] = self.call(
                name, "share", self.adverts, self.threshold, context=context
            )
        return self

    def holders(self, name: str) -> list[str]:
        """Return who else holds shares of a site's secrets."""
        return [e.recipient for e in self.made[name] if e.recipient != name]

    def inbox(self, name: str, senders: Collection[str] = NAMES) -> list[Envelope]:
        return [
            envelope
            for sender in NAMES
            for envelope in self.made[sender]
            if envelope.recipient == name and sender != name and sender in senders
        ]

    def to_masks(self, senders: Sequence[str] = NAMES) -> World:
        for name in senders:
            self.call(name, "mask", self.inbox(name, senders), senders)
        return self

    def confirmed(self, survivors: Sequence[str], who: Collection[str]) -> list[Confirmation]:
        return [self.call(name, "confirm", list(survivors)) for name in who]

    def revealed(
        self, survivors: Sequence[str], signed: list[Confirmation], who: Collection[str]
    ) -> dict[str, Reveal]:
        """Return what those of some sites reveal that do."""
        dropped = [name for name in NAMES if name not in survivors]
        found = {}
        for name in who:
            try:
                found[name] = self.call(name, "reveal", list(survivors), dropped, signed)
            except FalseMessage:
                continue
        return found


def without(gone: Collection[str], names: Sequence[str] = NAMES) -> list[str]:
    return [name for name in names if name not in gone]


@pytest.fixture
def world() -> World:
    return World().to_shares()


# --- whom a site picks


def test_a_site_picks_its_holders_itself_and_once_in_an_attempt(world: World) -> None:
    again = world.call(VICTIM, "share", world.adverts, world.threshold)
    assert again == world.made[VICTIM], "asked again, after a restart, it does not pick others"
    assert len(world.holders(VICTIM)) == DEGREE
    for other in (NAMES, NAMES[:-1]):
        adverts = [advert for advert in world.adverts if advert.name in other]
        threshold = world.threshold + (other is NAMES)
        assert "another share" in world.refuses(VICTIM, "share", adverts, threshold)


def test_with_the_same_adverts_it_would_have_picked_others(world: World) -> None:
    """So nothing that the coordinator knows before says whom."""
    world.files.clear()
    picked = set()
    for _ in range(4):
        own = world.call(VICTIM, "advertise")
        before = world.files[VICTIM]
        adverts = [own if advert.name == VICTIM else advert for advert in world.adverts]
        made = world.call(VICTIM, "share", adverts, world.threshold)
        picked.add(tuple(envelope.recipient for envelope in made))
        world.files[VICTIM] = before  # the same secrets and the same cohort
    assert len(picked) == 4


def test_a_second_attempt_has_other_holders(world: World) -> None:
    first = [world.holders(name) for name in NAMES]
    world.to_shares(replace(ROUND, attempt=2))
    assert [world.holders(name) for name in NAMES] != first


# --- envelopes


def test_withheld_envelopes_take_no_mask_away_that_a_site_counts_on(world: World) -> None:
    """The masks with the holders that a site picked need no word of theirs."""
    inbox = world.inbox(VICTIM)
    holders = set(world.holders(VICTIM))
    full = World(keys=world.keys, files=dict(world.files), made=world.made)
    every = full.call(VICTIM, "mask", inbox, NAMES)
    picked_by = {envelope.sender for envelope in inbox}
    assert count(every) == 1 + len(holders | picked_by)
    keys = world.call(VICTIM, "mask", [], NAMES)
    assert count(keys) == 1 + DEGREE
    assert {bytes(key) for key in (*keys.plus, *keys.minus)} <= {
        bytes(key) for key in (*every.plus, *every.minus)
    }
    assert "another mask" in world.refuses(VICTIM, "mask", inbox, NAMES)


def count(keys: MaskKeys) -> int:
    return len(keys.plus) + len(keys.minus)


def test_a_site_whose_holders_are_kept_from_it_sends_no_vector(world: World) -> None:
    gone = world.holders(VICTIM)[:5]
    senders = without(gone)
    assert len(senders) >= world.threshold
    said = world.refuses(VICTIM, "mask", world.inbox(VICTIM, senders), senders)
    assert "6 holders of this site's secrets among the senders, not 7" in said
    senders = without(gone[1:])
    world.call(VICTIM, "mask", world.inbox(VICTIM, senders), senders)


def test_senders_without_the_site_or_with_strangers_are_refused(world: World) -> None:
    inbox = world.inbox(VICTIM)
    for senders, why in (
        (without([VICTIM]), "not among the senders"),
        ([*NAMES, "zoe"], "zoe cannot be among"),
        (NAMES[::-1], "sorted list"),
        ([NAMES[0], *NAMES], "sorted list"),
        (without(world.holders("site-00")[:9]), "below the threshold"),
        ([], "below the threshold"),
    ):
        assert why in world.refuses(VICTIM, "mask", inbox, senders)


def test_an_invented_neighbour_is_refused(world: World) -> None:
    """Envelopes of nobody, of one who dropped out, for another, or signed by another."""
    cohort = Cohort(ROUND, tuple(world.adverts), world.threshold, world.graph)
    inbox = world.inbox(VICTIM)
    first = inbox[0]
    silent = next(n for n in NAMES if n not in {e.sender for e in inbox} and n != VICTIM)
    invented = [
        ([replace(first, sender="zoe")], NAMES, "zoe cannot be among"),
        ([first], without([first.sender]), "cannot be among the makers"),
        ([replace(first, sender=VICTIM)], NAMES, "cannot be among the makers"),
        ([replace(first, sender=silent)], NAMES, "is not signed by it"),
        ([replace(first, sender=silent).signed(cohort, world.keys["site-01"])
          if silent != "site-01" else replace(first, sender=silent)], NAMES, "is not signed by"),
        ([next(e for e in world.made[first.sender] if e.recipient != VICTIM)], NAMES,
         "an envelope for"),
        ([first, first], NAMES, "sorted list"),
        (inbox[::-1], NAMES, "sorted list"),
    ]  # fmt: skip
    for envelopes, senders, why in invented:
        assert why in world.refuses(VICTIM, "mask", envelopes, senders)


def test_a_cohort_of_another_graph_is_another_cohort(world: World) -> None:
    """Sites that count holders differently do not take each other's envelopes."""
    cohort = Cohort(ROUND, tuple(world.adverts), world.threshold)
    first = world.inbox(VICTIM)[0]
    elsewhere = first.signed(cohort, world.keys[first.sender])
    assert "not signed by it" in world.refuses(VICTIM, "mask", [elsewhere], NAMES)


def test_who_gives_two_of_its_holders_false_shares_is_named_by_both_and_left_out(
    world: World,
) -> None:
    """Each of the two refuses and remembers nothing, so both can be in the next attempt."""
    cheat = NAMES[3]
    cheated = world.holders(cheat)[:2]
    cohort = Cohort(ROUND, tuple(world.adverts), world.threshold, world.graph)
    world.made[cheat] = [
        replace(envelope, seed_share=bytes(32)).signed(cohort, world.keys[cheat])
        if envelope.recipient in cheated
        else envelope
        for envelope in world.made[cheat]
    ]
    for name in NAMES:
        if name in cheated:
            before = world.files[name]
            with pytest.raises(FalseMessage) as refused:
                world.call(name, "mask", world.inbox(name), NAMES)
            assert (refused.value.sender, world.files[name]) == (cheat, before)
        else:
            world.call(name, "mask", world.inbox(name), NAMES)
    left, second = without([cheat]), replace(ROUND, attempt=2)
    adverts = [world.call(name, "advertise", context=second) for name in left]
    world.made = {
        name: world.call(name, "share", adverts, world.threshold, context=second) for name in left
    }
    for name in left:
        inbox = [e for maker in left for e in world.made[maker] if e.recipient == name != maker]
        assert count(world.call(name, "mask", inbox, left, context=second)) > 1


# --- the sum


def test_a_site_that_is_cut_off_confirms_nothing_and_its_seed_stays_hidden(world: World) -> None:
    """All of the victim's holders that may go, go; everybody else is told so, and plays along."""
    world.to_masks()
    survivors = without(world.holders(VICTIM)[:5])
    assert "holders of this site's secrets among the survivors" in world.refuses(
        VICTIM, "confirm", survivors
    )
    who = without([VICTIM], survivors)
    playing = []
    for name in who:
        try:
            playing += world.confirmed(survivors, [name])
        except FalseMessage:
            continue
    assert len(playing) >= world.threshold
    answers = world.revealed(survivors, playing, [one.name for one in playing])
    assert answers, "the others see nothing wrong: it is the shares that are too few"
    assert sum(VICTIM in answer.seeds for answer in answers.values()) < HOLDERS
    assert not any(VICTIM in answer.masks for answer in answers.values())


def test_without_enough_of_its_own_holders_confirming_a_site_reveals_nothing(world: World) -> None:
    world.to_masks()
    survivors = list(NAMES)
    signed = world.confirmed(survivors, NAMES)
    quiet = world.holders(VICTIM)[:5]
    shown = [one for one in signed if one.name not in quiet]
    assert len(shown) >= world.threshold
    said = world.refuses(VICTIM, "reveal", survivors, [], shown)
    assert "6 holders of this site's secrets among the sites that confirmed this sum" in said
    assert "6 holders" in world.refuses(VICTIM, "reveal", survivors, [], [*shown, *shown])
    renamed = [replace(shown[0], name=name) for name in quiet]
    assert "6 holders" in world.refuses(VICTIM, "reveal", survivors, [], [*shown, *renamed])
    one_more = [*shown, next(one for one in signed if one.name == quiet[0])]
    assert isinstance(world.call(VICTIM, "reveal", survivors, [], one_more), Reveal)


def test_a_site_gives_of_the_named_only_what_it_holds(world: World) -> None:
    world.to_masks()
    gone = next(n for n in NAMES if VICTIM not in world.holders(n) and n != VICTIM)
    survivors = without([gone])
    signed = world.confirmed(survivors, survivors)
    answer = world.call(VICTIM, "reveal", survivors, [gone], signed)
    assert answer.masks == {}
    held = {name for name in survivors if VICTIM in world.holders(name)} | {VICTIM}
    assert set(answer.seeds) == held
    kept = world.state(VICTIM)
    assert set(kept.seed_shares) == held
    assert kept.mask_shares == {}
    assert kept.secrets == []


def test_a_survivors_list_for_each_neighbourhood_reveals_nothing(world: World) -> None:
    """The victim's holders are told one sum and all the others another."""
    world.to_masks()
    near = {VICTIM, *world.holders(VICTIM)}
    far = without(near)
    first, second = list(NAMES), without([far[0]])
    one = world.confirmed(first, sorted(near))
    two = world.confirmed(second, far[1:])
    for name in (*near, *far[1:]):
        survivors = first if name in near else second
        dropped = without(survivors)
        said = world.refuses(name, "reveal", survivors, dropped, [*one, *two])
        assert "sites confirmed this sum" in said


def both_kinds(holders: int) -> tuple[int, int]:
    """Return how many shares of each of the victim's secrets a coordinator gets that splits lists.

    Two sites are corrupt, and a bare majority may confirm: two lists have enough signatures. The
    victim is in one list and dropped in the other. Each honest holder goes by the list that it
    confirmed, the corrupt two give all that they have.

    Args:
        holders: How many holders must be there, must confirm, and give a secret.
    """
    world = World(share=0.52, holders_needed=holders).to_shares().to_masks()
    honest, corrupt = (
        without([VICTIM], NAMES[:22]),
        {name: world.state(name) for name in NAMES[22:]},
    )
    cohort = Cohort(ROUND, tuple(world.adverts), world.threshold, world.graph)
    seeds, masks = set(), set()
    for survivors, who in (
        (list(NAMES), [VICTIM, *honest[::2][:10]]),
        (without([VICTIM]), without(honest[::2][:10], honest)),
    ):
        signed = world.confirmed(survivors, who) + [
            Confirmation.signed(name, world.keys[name], cohort, list(NAMES), survivors)
            for name in corrupt
        ]
        assert len(signed) >= world.threshold
        for name, answer in world.revealed(survivors, signed, who).items():
            seeds |= {name} if VICTIM in answer.seeds else set()
            masks |= {name} if VICTIM in answer.masks else set()
    assert not seeds & masks, "an honest holder gives one kind"
    seeds |= {name for name, state in corrupt.items() if VICTIM in state.seed_shares}
    masks |= {name for name, state in corrupt.items() if VICTIM in state.mask_shares}
    return len(seeds), len(masks)


def test_disjoint_holders_do_not_give_both_kinds_of_share() -> None:
    """Seven and seven of eleven holders would have three in common, and only two are corrupt."""
    assert min(both_kinds(HOLDERS)) < HOLDERS


def test_they_would_if_fewer_shares_gave_a_secret() -> None:
    """The attack is real: four and four of eleven holders need have none in common."""
    assert min(both_kinds(4)) >= 4

"""A coordinator that lies to sites in secure aggregation: each lie ends in a refusal.

The sites are real, the coordinator is whoever writes the test. What it must never get: both secrets
of a site, a share on too few or other confirmations, a second masked vector of a round that can be
summed, or an answer in a round that is closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import pytest

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.member import MaskKeys, Member, Rules, State
from lepton_fed.privacy.secagg.messages import (
    Advert,
    Cohort,
    Confirmation,
    Envelope,
    FalseMessage,
    Reveal,
)
from lepton_fed.privacy.secagg.requests import ConfirmRequest, read_body

NAMES = ("a", "b", "c", "d", "e", "f")
VICTIM = "a"
THRESHOLD = 4
ROUND = Context("run", 5, 1, "roster", "task", "layout")
RULES = Rules(min_cohort=3, threshold=2 / 3)


@dataclass
class World:
    """Sites whose memory is a file: each call is by a process that was started for it."""

    keys: dict[str, PrivateKey] = field(
        default_factory=lambda: {name: PrivateKey.generate() for name in NAMES}
    )
    files: dict[str, bytes] = field(default_factory=dict)
    adverts: list[Advert] = field(default_factory=list)
    envelopes: dict[str, list[Envelope]] = field(default_factory=dict)

    def call(self, name: str, phase: str, *request: object, context: Context = ROUND) -> object:
        """Ask a site; what it remembers is written before the answer is seen."""
        roster = {other: key.public_key() for other, key in self.keys.items() if other in NAMES}
        state = decode(State, strict_json(self.files[name])) if name in self.files else State()
        member = Member(name, self.keys[name], roster, RULES, state)
        try:
            return getattr(member, phase)(context, *request)
        finally:
            self.files[name] = json.dumps(asdict(member.state)).encode()

    def refuses(self, name: str, phase: str, *request: object, context: Context = ROUND) -> str:
        """Assert that a site refuses, and remembers nothing new; return what it says."""
        before = self.files.get(name)
        with pytest.raises(FalseMessage) as refused:
            self.call(name, phase, *request, context=context)
        if before is not None:
            assert self.files[name] == before, "a refusal changes nothing"
        return str(refused.value)

    def to_adverts(self, context: Context = ROUND, names: Sequence[str] = NAMES) -> World:
        self.adverts = [self.call(name, "advertise", context=context) for name in names]  # type: ignore[misc]
        return self

    def to_shares(self, context: Context = ROUND, threshold: int = THRESHOLD) -> World:
        self.to_adverts(context)
        for name in NAMES:
            self.envelopes[name] = self.call(  # type: ignore[assignment]
                name, "share", self.adverts, threshold, context=context
            )
        return self

    def inbox(self, name: str, senders: Sequence[str] = NAMES) -> list[Envelope]:
        at = [advert.name for advert in self.adverts].index(name)
        return [self.envelopes[sender][at] for sender in senders if sender != name]

    def to_masks(self, senders: Sequence[str] = NAMES, context: Context = ROUND) -> World:
        for name in senders:
            self.call(name, "mask", self.inbox(name, senders), senders, context=context)
        return self

    def confirmed(
        self, survivors: Sequence[str], who: Sequence[str] = (), context: Context = ROUND
    ) -> list[Confirmation]:
        return [
            self.call(name, "confirm", list(survivors), context=context)  # type: ignore[misc]
            for name in who or survivors
        ]


@pytest.fixture
def world() -> World:
    return World()


# --- what is asked

MODEL, DEAD = "1" * 64, "2" * 64


def test_sites_that_were_sent_different_models_are_masked_with_nobody(world: World) -> None:
    """A model that cannot learn at all sites but one would make the sum that one's update."""
    world.to_adverts()
    for name in NAMES:
        subject = MODEL if name == VICTIM else DEAD
        world.envelopes[name] = world.call(  # type: ignore[assignment]
            name, "share", world.adverts, THRESHOLD, subject
        )
    assert "not signed by it for this round" in world.refuses(
        VICTIM, "mask", world.inbox(VICTIM), NAMES
    )
    assert "not signed by it for this round" in world.refuses("b", "mask", world.inbox("b"), NAMES)
    world.to_masks(NAMES[1:])  # the others, who were sent the same, can go on


def test_another_model_for_the_same_attempt_is_refused(world: World) -> None:
    world.to_adverts()
    world.call(VICTIM, "share", world.adverts, THRESHOLD, MODEL)
    said = world.refuses(VICTIM, "share", world.adverts, THRESHOLD, DEAD)
    assert "another share was answered" in said


# --- who takes part


def test_a_site_that_was_taken_off_the_roster_is_masked_with_nobody(world: World) -> None:
    world.to_shares()
    gone = world.keys.pop("f")
    assert "f is not on the roster" in world.refuses(VICTIM, "mask", world.inbox(VICTIM), NAMES)
    world.keys["f"] = gone
    world.to_masks()
    signed = world.confirmed(NAMES)
    world.keys.pop("f")
    said = world.refuses(VICTIM, "reveal", list(NAMES), [], signed)
    assert "f is not on the roster" in said


@pytest.mark.parametrize("name", ["\ud800", "\u00e9"])
def test_texts_that_could_not_be_written_again_are_refused(name: str) -> None:
    content = json.dumps({"roster": "r", "survivors": [name]}).encode()
    with pytest.raises(FalseMessage, match="an escaped character"):
        read_body(ConfirmRequest, content)


def test_a_cohort_with_a_site_that_is_not_on_the_roster_is_refused(world: World) -> None:
    world.to_adverts()
    invented = PrivateKey.generate()
    world.keys["zoe"] = invented
    zoe = Member("zoe", invented, {}, RULES).advertise(ROUND)
    assert "not on the roster" in world.refuses(
        VICTIM, "share", [*world.adverts, zoe], THRESHOLD + 1
    )


def test_keys_that_the_coordinator_made_for_a_site_of_the_roster_are_refused(world: World) -> None:
    world.to_adverts()
    own = Member("b", PrivateKey.generate(), {}, RULES).advertise(ROUND)
    forged = [own if advert.name == "b" else advert for advert in world.adverts]
    assert "is not signed by it" in world.refuses(VICTIM, "share", forged, THRESHOLD)


@pytest.mark.parametrize(
    "other",
    [
        replace(ROUND, round_number=4),
        replace(ROUND, run="another"),
        replace(ROUND, attempt=2),
        replace(ROUND, roster="another"),
        replace(ROUND, task="another"),
        replace(ROUND, layout="another"),
    ],
)
def test_an_advert_of_another_attempt_is_refused(world: World, other: Context) -> None:
    replayed = World(keys=world.keys).to_adverts(other).adverts
    world.to_adverts()
    mixed = [world.adverts[0], *replayed[1:]]
    assert "is not signed by it for this round" in world.refuses(VICTIM, "share", mixed, THRESHOLD)


@pytest.mark.parametrize("threshold", [0, 1, 2, 3, 7, 100, -4])
def test_a_threshold_below_the_owners_or_above_the_cohort_is_refused(
    world: World, threshold: int
) -> None:
    world.to_adverts()
    assert "threshold" in world.refuses(VICTIM, "share", world.adverts, threshold)


def test_a_cohort_of_the_victim_alone_or_of_two_is_refused(world: World) -> None:
    world.to_adverts()
    world.refuses(VICTIM, "share", world.adverts[:1], 1)
    world.refuses(VICTIM, "share", world.adverts[:2], 2)


def test_one_site_under_many_entries_is_refused(world: World) -> None:
    world.to_adverts()
    one = world.adverts[1]
    assert "different sites" in world.refuses(VICTIM, "share", [world.adverts[0], one, one, one], 3)
    renamed = [replace(one, name=name) for name in ("b", "c", "d")]
    world.refuses(VICTIM, "share", [world.adverts[0], *renamed], 3)


def test_a_cohort_without_the_victim_or_with_an_older_advert_of_its_is_refused(
    world: World,
) -> None:
    world.to_adverts()
    assert "without this site" in world.refuses(VICTIM, "share", world.adverts[1:], THRESHOLD)
    foreign = World(keys=world.keys).to_adverts().adverts[0]  # the same site, other secrets
    assert foreign != world.adverts[0]
    world.refuses(VICTIM, "share", [foreign, *world.adverts[1:]], THRESHOLD)


def test_a_second_cohort_in_one_attempt_is_refused_after_a_restart_too(world: World) -> None:
    world.to_shares()
    assert "another share was answered" in world.refuses(
        VICTIM, "share", world.adverts[:-1], THRESHOLD
    )
    assert "another share was answered" in world.refuses(
        VICTIM, "share", world.adverts, THRESHOLD + 1
    )
    again = world.call(VICTIM, "share", world.adverts, THRESHOLD)
    assert again == world.envelopes[VICTIM], "the same request gets the same shares"


# --- envelopes


def test_swapped_edited_and_foreign_envelopes_are_refused(world: World) -> None:
    world.to_shares()
    inbox = world.inbox(VICTIM)
    other = world.inbox("b")
    swapped = [other[-1] if envelope.sender == "f" else envelope for envelope in inbox]
    assert "an envelope for b" in world.refuses(VICTIM, "mask", swapped, NAMES)
    relabelled = [replace(envelope, recipient=VICTIM) for envelope in swapped]
    assert "not signed by" in world.refuses(VICTIM, "mask", relabelled, NAMES)
    edited = [replace(inbox[0], sealed=inbox[0].sealed[:-1] + b"x"), *inbox[1:]]
    assert "not signed by" in world.refuses(VICTIM, "mask", edited, NAMES)
    twice = [inbox[0], *inbox]
    assert "different sites" in world.refuses(VICTIM, "mask", twice, NAMES)


def test_an_envelope_of_another_attempt_is_refused(world: World) -> None:
    before = World(keys=world.keys)
    before.to_shares(replace(ROUND, round_number=4))
    world.to_shares()
    mixed = [before.inbox(VICTIM)[0], *world.inbox(VICTIM)[1:]]
    assert "not signed by" in world.refuses(VICTIM, "mask", mixed, NAMES)


def test_too_few_envelopes_are_refused(world: World) -> None:
    world.to_shares()
    assert "below the threshold" in world.refuses(
        VICTIM, "mask", world.inbox(VICTIM, NAMES[:3]), NAMES[:3]
    )
    assert "below the threshold" in world.refuses(VICTIM, "mask", [], [])


def test_an_envelope_that_is_withheld_or_of_no_sender_is_refused(world: World) -> None:
    """Where everybody holds shares of everybody, each sender but the site itself made one."""
    world.to_shares()
    inbox = world.inbox(VICTIM)
    assert "no envelope of b" in world.refuses(VICTIM, "mask", inbox[1:], NAMES)
    assert "no envelope of b" in world.refuses(VICTIM, "mask", [], NAMES)
    assert "b cannot be among the makers" in world.refuses(
        VICTIM, "mask", inbox, [name for name in NAMES if name != "b"]
    )
    assert "not among the senders" in world.refuses(VICTIM, "mask", inbox, NAMES[1:])


def test_a_second_set_of_envelopes_is_refused_after_a_restart_too(world: World) -> None:
    world.to_shares()
    first = world.call(VICTIM, "mask", world.inbox(VICTIM), NAMES)
    assert "another mask was answered" in world.refuses(
        VICTIM, "mask", world.inbox(VICTIM, NAMES[:5]), NAMES[:5]
    )
    again = world.call(VICTIM, "mask", world.inbox(VICTIM), NAMES)
    assert isinstance(first, MaskKeys)
    assert again == first, "the same vector under the same masks"


def test_a_site_that_makes_a_false_share_is_named(world: World) -> None:
    world.to_adverts()
    for name in NAMES:
        world.envelopes[name] = world.call(name, "share", world.adverts, THRESHOLD)  # type: ignore[assignment]
    cohort = Cohort(ROUND, tuple(world.adverts), THRESHOLD)
    lying = replace(world.envelopes["b"][0], seed_share=bytes(32)).signed(cohort, world.keys["b"])
    world.envelopes["b"][0] = lying
    said = world.refuses(VICTIM, "mask", world.inbox(VICTIM), NAMES)
    assert said.startswith("b: ")


# --- the sum


def test_phases_out_of_order_are_refused(world: World) -> None:
    world.to_adverts()
    assert "no shares" in world.refuses(VICTIM, "mask", [], NAMES)
    world = World(keys=world.keys).to_shares()
    assert "comes after" in world.refuses(VICTIM, "confirm", list(NAMES))
    assert "comes after" in world.refuses(VICTIM, "reveal", list(NAMES), [], [])
    world.to_masks()
    assert "comes after" in world.refuses(VICTIM, "reveal", list(NAMES), [], [])


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ([VICTIM], "below the threshold"),
        ([VICTIM] * 4, "different sites"),
        ([VICTIM, VICTIM, "b", "c", "d"], "different sites"),
        (["d", "c", "b", "a"], "sorted"),
        (["b", "c", "d", "e"], "a sum without"),
        (["a", "b", "c", "z"], "cannot be among"),
        (["a", "b", "c"], "below the threshold"),
        ([], "below the threshold"),
    ],
)
def test_a_sum_that_may_not_be_opened_is_not_confirmed(
    world: World, survivors: list[str], why: str
) -> None:
    world.to_shares().to_masks()
    assert why in world.refuses(VICTIM, "confirm", survivors)


def test_a_site_that_sent_no_envelope_cannot_be_in_the_sum(world: World) -> None:
    world.to_shares().to_masks(NAMES[:5])
    assert "cannot be among" in world.refuses(VICTIM, "confirm", ["a", "b", "c", "f"])


def test_a_second_sum_is_not_confirmed_after_a_restart_either(world: World) -> None:
    world.to_shares().to_masks()
    world.call(VICTIM, "confirm", list(NAMES))
    assert "another confirm" in world.refuses(VICTIM, "confirm", list(NAMES[:5]))
    assert world.call(VICTIM, "confirm", list(NAMES)) == world.call(VICTIM, "confirm", list(NAMES))


def test_split_views_reveal_nothing(world: World) -> None:
    """Half of the sites are shown one sum, half another: neither has enough confirmations."""
    world.to_shares().to_masks()
    first, second = list(NAMES[:5]), [*NAMES[:4], "f"]
    one = world.confirmed(first, ["a", "b"])
    two = world.confirmed(second, ["c", "d", "f"])
    assert "sites confirmed" in world.refuses("a", "reveal", first, ["f"], [*one, *two])
    assert "sites confirmed" in world.refuses("c", "reveal", second, ["e"], [*one, *two])
    assert "other survivors" in world.refuses("a", "reveal", second, ["e"], [*one, *two])


def test_forged_and_repeated_confirmations_do_not_count(world: World) -> None:
    world.to_shares().to_masks()
    survivors = list(NAMES)
    (own,) = world.confirmed(survivors, [VICTIM])
    repeated = [own] * 6
    renamed = [replace(own, name=name) for name in NAMES]
    for forged in (repeated, renamed, [Confirmation(name, bytes(64)) for name in NAMES]):
        assert "1 sites confirmed" in world.refuses(VICTIM, "reveal", survivors, [], [own, *forged])
    assert "0 sites confirmed" in world.refuses(VICTIM, "reveal", survivors, [], [])


def test_confirmations_of_another_attempt_do_not_count(world: World) -> None:
    before = World(keys=world.keys).to_shares(replace(ROUND, round_number=4))
    before.to_masks(context=replace(ROUND, round_number=4))
    replayed = before.confirmed(NAMES, context=replace(ROUND, round_number=4))
    world.to_shares().to_masks()
    world.confirmed(NAMES, [VICTIM])
    assert "0 sites confirmed" in world.refuses(VICTIM, "reveal", list(NAMES), [], replayed)


def test_nobody_gives_both_shares_of_a_site(world: World) -> None:
    world.to_shares().to_masks()
    survivors = list(NAMES[:5])
    signed = world.confirmed(survivors)
    for lists in (
        (survivors, ["b", "f"]),  # both of b
        (survivors, ["f", "f"]),
        (survivors, []),  # and f later
        (list(NAMES), []),  # what was not confirmed
        (survivors[:4], ["e", "f"]),
        (survivors, ["z"]),
    ):
        world.refuses(VICTIM, "reveal", *lists, signed)
    answer = world.call(VICTIM, "reveal", survivors, ["f"], signed)
    assert isinstance(answer, Reveal)
    assert (sorted(answer.seeds), sorted(answer.masks)) == (survivors, ["f"])


def opened(world: World) -> tuple[list[str], list[Confirmation]]:
    """Bring a round to its end for the victim; ``f`` dropped out."""
    world.to_shares().to_masks()
    survivors = list(NAMES[:5])
    signed = world.confirmed(survivors)
    world.call(VICTIM, "reveal", survivors, ["f"], signed)
    return survivors, signed


def test_a_second_reveal_is_refused_after_a_restart_too(world: World) -> None:
    survivors, signed = opened(world)
    again = world.call(VICTIM, "reveal", survivors, ["f"], signed)
    assert isinstance(again, Reveal), "the same request gets the same answer"
    assert world.refuses(VICTIM, "reveal", survivors, ["e", "f"], signed)
    assert world.refuses(VICTIM, "reveal", list(NAMES), [], signed)


@pytest.mark.parametrize("attempt", [1, 2, 99])
def test_a_round_that_was_opened_is_closed_for_good(world: World, attempt: int) -> None:
    opened(world)
    context = replace(ROUND, attempt=attempt)
    assert "closed" in world.refuses(VICTIM, "advertise", context=context)
    for phase, request in (
        ("share", (world.adverts, THRESHOLD)),
        ("mask", (world.inbox(VICTIM), NAMES)),
        ("confirm", (list(NAMES[:5]),)),
    ):
        world.refuses(VICTIM, phase, *request, context=context)
    earlier = replace(ROUND, round_number=4, attempt=attempt)
    assert "closed" in world.refuses(VICTIM, "advertise", context=earlier)


def test_nothing_secret_stays_on_disk_but_what_was_revealed(world: World) -> None:
    world.to_shares().to_masks()
    before = decode(State, strict_json(world.files[VICTIM]))
    survivors = list(NAMES[:5])
    world.call(VICTIM, "reveal", survivors, ["f"], world.confirmed(survivors))
    after = world.files[VICTIM].decode()
    for secret in (*before.secrets, before.seed_shares["f"], *before.mask_shares.values()):
        if secret != before.mask_shares["f"]:
            assert secret not in after


# --- a second attempt


def test_a_second_attempt_has_other_keys_and_the_first_is_over(world: World) -> None:
    world.to_shares().to_masks()
    first, before = world.adverts[0], world.inbox(VICTIM)
    second = World(keys=world.keys, files=world.files).to_shares(replace(ROUND, attempt=2))
    assert second.adverts[0].mask != first.mask
    assert second.adverts[0].envelope != first.envelope
    assert "no shares for this attempt" in world.refuses(VICTIM, "mask", before, NAMES)
    assert "no shares for this attempt" in world.refuses(VICTIM, "confirm", list(NAMES))
    assert "lies behind" in world.refuses(VICTIM, "advertise")


@pytest.mark.parametrize(
    ("names", "threshold"), [(("a", "b", "c", "d"), 3), (("a", "b", "c"), 3), (("a", "b", "c"), 2)]
)
def test_a_second_attempt_with_a_lower_threshold_is_refused(
    world: World, names: tuple[str, ...], threshold: int
) -> None:
    """Otherwise two disjoint halves could each open a sum with the victim's one vector."""
    world.to_shares()
    context = replace(ROUND, attempt=2)
    second = World(keys=world.keys, files=world.files).to_adverts(context, names)
    assert second.refuses(VICTIM, "share", second.adverts, threshold, context=context)


def test_a_second_attempt_with_other_sites_is_refused(world: World) -> None:
    names = NAMES[:5]
    world.to_adverts(names=names)
    world.call(VICTIM, "share", world.adverts, THRESHOLD)
    context = replace(ROUND, attempt=2)
    second = World(keys=world.keys, files=world.files).to_adverts(context)
    said = second.refuses(VICTIM, "share", second.adverts, THRESHOLD, context=context)
    assert "the first at its round had not" in said


def test_no_two_sums_of_a_round_can_both_be_opened(world: World) -> None:
    """Every pair of attempts, with whatever sites the coordinator takes for each."""
    world.to_shares().to_masks()
    survivors = list(NAMES[:4])
    signed = world.confirmed(survivors)
    revealed = ["b", "c", "d"]  # the victim itself is never asked, and knows nothing of it
    for name in revealed:
        world.call(name, "reveal", survivors, ["e", "f"], signed)
    context = replace(ROUND, attempt=2)
    second = World(keys=world.keys, files=world.files)
    free = [name for name in NAMES if name not in revealed]
    second.to_adverts(context, free)
    for name in revealed:
        assert "closed" in second.refuses(name, "advertise", context=context)
    assert second.refuses(VICTIM, "share", second.adverts, 3, context=context)


def test_answers_differ_from_attempt_to_attempt_and_never_within_one(world: World) -> None:
    asks: list[Callable[[], object]] = [
        lambda: world.call(VICTIM, "advertise"),
        lambda: world.call(VICTIM, "share", world.adverts, THRESHOLD),
        lambda: world.call(VICTIM, "mask", world.inbox(VICTIM), NAMES),
    ]
    world.to_shares()
    for ask in asks:
        assert ask() == ask()

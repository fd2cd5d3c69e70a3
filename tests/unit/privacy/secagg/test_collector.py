"""The coordinator names who sends something false, and goes on with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg import keys, member
from lepton_fed.privacy.secagg.collector import Collector, TooFew
from lepton_fed.privacy.secagg.keys import WRAPPED_BYTES, wrap_pair_secret
from lepton_fed.privacy.secagg.messages import Confirmation, FalseMessage, Reveal
from tests.unit.privacy.secagg.test_protocol import NAMES as MANY
from tests.unit.privacy.secagg.test_protocol import ROUND, SIZE, Federation, few

NAMES = list("abcde")
THRESHOLD = 4


@dataclass
class Attempt:
    """An attempt of five sites, brought as far as a test wants it."""

    federation: Federation = field(default_factory=lambda: Federation(list(NAMES)))

    def __post_init__(self) -> None:
        self.collector = Collector(ROUND, self.federation.roster, SIZE)

    def ask(self, name: str, phase: str, *request: object) -> Any:
        site = self.federation.member(name)
        answer = getattr(site, phase)(ROUND, *request)
        self.federation.keep(name, site)
        return answer

    def to_adverts(self) -> Attempt:
        for name in NAMES:
            self.collector.add_advert(name, self.ask(name, "advertise"))
        self.cohort = self.collector.form(THRESHOLD)
        return self

    def envelopes(self, name: str) -> Any:
        return self.ask(name, "share", self.cohort.adverts, THRESHOLD)

    def to_envelopes(self) -> Attempt:
        self.to_adverts()
        for name in NAMES:
            self.collector.add_envelopes(name, self.envelopes(name))
        self.collector.close_envelopes()
        return self

    def masked(self, name: str) -> Any:
        envelopes = self.collector.envelopes_for(name)
        return self.federation.masked(
            name, self.ask(name, "mask", envelopes, self.collector.senders)
        )

    def to_sum(self, names: str = "abcd") -> Attempt:
        self.to_envelopes()
        for name in names:
            self.collector.add_masked(name, self.masked(name))
        self.survivors = self.collector.close_masked()
        return self

    def to_confirmations(self) -> Attempt:
        self.to_sum()
        for name in self.survivors:
            self.collector.add_confirmation(name, self.ask(name, "confirm", self.survivors))
        self.signed = self.collector.close_confirmations()
        return self

    def reveal(self, name: str) -> Reveal:
        answer = self.ask(name, "reveal", self.survivors, self.collector.dropped, self.signed)
        assert isinstance(answer, Reveal)
        return answer


@pytest.fixture
def attempt() -> Attempt:
    return Attempt()


def test_an_advert_that_is_not_the_sites_own_is_named(attempt: Attempt) -> None:
    good = attempt.ask("a", "advertise")
    collector = attempt.collector
    for site, advert in (
        ("b", good),
        ("a", replace(good, self_mask=bytes(32))),
        ("a", replace(good, signature=bytes(64))),
        ("stranger", replace(good, name="stranger")),
    ):
        with pytest.raises(FalseMessage) as false:
            collector.add_advert(site, advert)
        assert false.value.sender == site
    collector.add_advert("a", good)
    with pytest.raises(FalseMessage, match="second"):
        collector.add_advert("a", good)


def test_envelopes_that_are_not_one_for_each_are_named(attempt: Attempt) -> None:
    attempt.to_adverts()
    good, other = attempt.envelopes("a"), attempt.envelopes("b")
    for wrong in (
        good[:-1],
        [*good, good[0]],
        [good[0], good[0], *good[2:]],
        [*good[:-1], replace(good[-1], sealed=b"x")],
        [*good[:-1], other[-1]],
    ):
        with pytest.raises(FalseMessage) as false:
            attempt.collector.add_envelopes("a", wrong)
        assert false.value.sender == "a"
    attempt.collector.add_envelopes("a", good)
    with pytest.raises(FalseMessage, match="second time"):
        attempt.collector.add_envelopes("a", good)


def test_a_masked_vector_that_does_not_fit_changes_no_sum(attempt: Attempt) -> None:
    attempt.federation.bits = 32
    attempt.to_envelopes()
    good = attempt.masked("a")
    for name, packed in (("stranger", good), ("a", good[:-1]), ("a", np.append(good, good[:4]))):
        with pytest.raises(FalseMessage):
            attempt.collector.add_masked(name, packed)
    attempt.collector.add_masked("a", good)
    with pytest.raises(FalseMessage, match="nobody waits for"):
        attempt.collector.add_masked("a", good)
    for name in "bcd":
        attempt.collector.add_masked(name, attempt.masked(name))
    assert attempt.collector.close_masked() == tuple("abcd")
    before = attempt.collector.total.copy()
    with pytest.raises(FalseMessage, match="nobody waits for"):
        attempt.collector.add_masked("e", attempt.masked("e"))  # too late: the sum is told
    np.testing.assert_array_equal(attempt.collector.total, before)


def test_bits_behind_the_last_word_are_named() -> None:
    attempt = Attempt(Federation(list(NAMES), 20))
    attempt.collector = Collector(ROUND, attempt.federation.roster, SIZE, 20)
    attempt.to_envelopes()
    packed = attempt.masked("a").copy()
    packed[-1] |= 0x80
    with pytest.raises(FalseMessage, match="filled up with zeros"):
        attempt.collector.add_masked("a", packed)


def test_below_the_threshold_each_phase_ends_the_attempt(attempt: Attempt) -> None:
    attempt.to_adverts()
    with pytest.raises(TooFew, match="0 sites are left, the threshold is 4"):
        attempt.collector.close_envelopes()
    for name in NAMES:
        attempt.collector.add_envelopes(name, attempt.envelopes(name))
    attempt.collector.close_envelopes()
    for name in "abc":
        attempt.collector.add_masked(name, attempt.masked(name))
    with pytest.raises(TooFew, match="3 sites are left"):
        attempt.collector.close_masked()


def test_a_confirmation_of_another_sum_is_named(attempt: Attempt) -> None:
    attempt.to_sum()
    good = attempt.ask("a", "confirm", attempt.survivors)
    for site, wrong in (
        ("e", replace(good, name="e")),
        ("b", good),
        ("a", Confirmation("a", bytes(64))),
        ("a", Confirmation("a", PrivateKey.generate().sign(b"another"))),
    ):
        with pytest.raises(FalseMessage) as false:
            attempt.collector.add_confirmation(site, wrong)
        assert false.value.sender == site


def test_a_false_share_names_who_gave_it_and_the_others_are_enough(attempt: Attempt) -> None:
    attempt.to_sum("abcde")
    for name in attempt.survivors:
        attempt.collector.add_confirmation(name, attempt.ask(name, "confirm", attempt.survivors))
    attempt.signed = attempt.collector.close_confirmations()
    honest = attempt.reveal("a")
    lies = [
        Reveal(honest.seeds | {"b": honest.seeds["c"]}, honest.masks),
        Reveal({k: v for k, v in honest.seeds.items() if k != "b"}, honest.masks),
        Reveal(honest.seeds, {"b": honest.seeds["b"]}),
        Reveal(honest.seeds | {"b": b""}, honest.masks),
    ]
    for lie in lies:
        with pytest.raises(FalseMessage) as false:
            attempt.collector.add_reveal("a", lie)
        assert false.value.sender == "a"
    for name in "bcde":
        attempt.collector.add_reveal(name, attempt.reveal(name))
    expected = attempt.federation.sum(attempt.survivors)
    np.testing.assert_array_equal(attempt.collector.unmask(), expected)


def test_with_too_few_shares_nothing_is_unmasked(attempt: Attempt) -> None:
    attempt.to_confirmations()
    for name in "abc":
        attempt.collector.add_reveal(name, attempt.reveal(name))
    with pytest.raises(TooFew):
        attempt.collector.unmask()


@pytest.mark.parametrize("cheat", ["b", "e"])
def test_a_site_that_shares_out_another_secret_is_named(
    cheat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shares fit its commitments to them, and together they give what it never advertised."""
    attempt = Attempt().to_adverts()
    split_at = member.split_at
    for name in NAMES:
        if name == cheat:
            monkeypatch.setattr(
                member, "split_at", lambda secret, *more: split_at(bytes(reversed(secret)), *more)
            )
        attempt.collector.add_envelopes(name, attempt.envelopes(name))
        monkeypatch.setattr(member, "split_at", split_at)
    attempt.collector.close_envelopes()
    for name in "abcd":  # e drops out, so that of e the mask secret is put together
        attempt.collector.add_masked(name, attempt.masked(name))
    attempt.survivors = attempt.collector.close_masked()
    for name in attempt.survivors:
        attempt.collector.add_confirmation(name, attempt.ask(name, "confirm", attempt.survivors))
    attempt.signed = attempt.collector.close_confirmations()
    for name in attempt.survivors:
        attempt.collector.add_reveal(name, attempt.reveal(name))
    with pytest.raises(FalseMessage) as false:
        attempt.collector.unmask()
    assert false.value.sender == cheat


# --- where a site picks few holders


@dataclass
class Sparse(Attempt):
    """An attempt of 24 sites with ten holders each."""

    federation: Federation = field(default_factory=lambda: Federation(MANY, graphs=few))

    def __post_init__(self) -> None:
        self.collector = self.federation.collector(ROUND)
        for name in MANY:
            self.collector.add_advert(name, self.ask(name, "advertise"))
        self.cohort = self.collector.form(16)
        self.made = {name: self.ask(name, "share", self.cohort.adverts, 16) for name in MANY}

    def holders(self, name: str) -> list[str]:
        """Return who else holds shares of a site's secrets."""
        return [envelope.recipient for envelope in self.made[name] if envelope.recipient != name]

    def close_without(self, gone: list[str]) -> tuple[str, ...]:
        for name in MANY:
            if name not in gone:
                self.collector.add_envelopes(name, self.made[name])
        return self.collector.close_envelopes()


@pytest.fixture
def sparse() -> Sparse:
    return Sparse()


def test_envelopes_for_more_or_fewer_holders_than_are_to_be_picked_are_named(
    sparse: Sparse,
) -> None:
    site, other = MANY[3], MANY[4]
    good = sparse.made[site]
    own = next(envelope for envelope in good if envelope.recipient == site)
    unpicked = next(n for n in MANY if n not in sparse.holders(site) and n != site)
    more = replace(good[0], recipient=unpicked).signed(sparse.cohort, sparse.federation.keys[site])
    stranger = replace(own, recipient="a").signed(sparse.cohort, sparse.federation.keys[site])
    in_order = sorted([*good, more], key=lambda envelope: envelope.recipient)
    for wrong in (
        good[:-1],
        in_order,
        good[::-1],
        [good[0], *good[:-1]],
        [stranger, *good[1:]],
        [envelope for envelope in in_order if envelope is not own],
        sparse.made[other],
        [],
    ):
        with pytest.raises(FalseMessage) as false:
            sparse.collector.add_envelopes(site, wrong)
        assert false.value.sender == site
    sparse.collector.add_envelopes(site, good)


def test_a_site_gets_the_envelopes_of_those_who_picked_it_and_no_others(sparse: Sparse) -> None:
    senders = sparse.close_without([])
    assert senders == sparse.collector.senders == tuple(MANY)
    for name in MANY:
        makers = [envelope.sender for envelope in sparse.collector.envelopes_for(name)]
        assert makers == [other for other in MANY if name in sparse.holders(other)]


def test_an_attempt_ends_where_one_site_has_too_few_holders_left(sparse: Sparse) -> None:
    gone = sparse.holders(MANY[0])[:5]  # 19 sites are left, the threshold of the cohort is 16
    with pytest.raises(TooFew, match=r"6 holders of the secrets of .* the threshold is 7") as few:
        sparse.close_without(gone)
    assert (few.value.left, few.value.threshold) == (6, 7)
    assert few.value.owner


def test_shares_of_others_than_a_site_holds_are_named(sparse: Sparse) -> None:
    senders = sparse.close_without([])
    gone = MANY[5]
    for name in senders:
        envelopes = sparse.collector.envelopes_for(name)
        made = sparse.ask(name, "mask", envelopes, senders)
        if name != gone:
            sparse.collector.add_masked(name, sparse.federation.masked(name, made))
    survivors = sparse.collector.close_masked()
    for name in survivors:
        sparse.collector.add_confirmation(name, sparse.ask(name, "confirm", survivors))
    signed = sparse.collector.close_confirmations()
    assert sparse.collector.dropped == (gone,)
    for name in survivors:
        reveal = sparse.ask(name, "reveal", survivors, (gone,), signed)
        held = [n for n in survivors if name in sparse.holders(n) or n == name]
        assert list(reveal.seeds) == held
        assert list(reveal.masks) == [gone] * (name in sparse.holders(gone))
        less = {n: share for n, share in reveal.seeds.items() if n != held[0]}
        unheld = next(n for n in survivors if n not in held)
        for wrong in (
            replace(reveal, seeds=less),
            replace(reveal, seeds=reveal.seeds | {unheld: reveal.seeds[name]}),
            replace(reveal, masks={} if reveal.masks else {gone: bytes(33)}),
        ):
            with pytest.raises(FalseMessage) as false:
                sparse.collector.add_reveal(name, wrong)
            assert false.value.sender == name
        sparse.collector.add_reveal(name, reveal)
    expected = sparse.federation.sum(survivors)
    np.testing.assert_array_equal(sparse.collector.unmask(), expected)


def wrapping(cheat: str, lie: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Sparse:
    """Return an attempt with post-quantum keys where one site wraps in a way of its own.

    The site picked somebody who did not pick it, so what it wraps counts there.
    """
    honest = member.wrap_pair_secret
    with monkeypatch.context() as lying:
        lying.setattr(
            member,
            "wrap_pair_secret",
            lambda pair, context, own, other: (lie if own.name == cheat else honest)(
                pair, context, own, other
            ),
        )
        while True:
            made = Sparse(Federation(MANY, post_quantum=True, graphs=few))
            if any(cheat not in made.holders(name) for name in made.holders(cheat)):
                return made


@pytest.mark.parametrize("cheat", [MANY[0], MANY[-1]])
def test_a_site_that_wraps_another_pair_secret_than_its_own_is_named_in_the_end(
    cheat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours cannot tell; once it dropped out and its secret is rebuilt, it shows."""

    def lie(*arguments: Any) -> bytes:
        with monkeypatch.context() as lying:
            lying.setattr(
                keys, "_pair_secret", lambda *_: bytearray(b"a lie of thirty-two bytes length")
            )
            return wrap_pair_secret(*arguments)

    attempt = wrapping(cheat, lie, monkeypatch)
    senders = attempt.close_without([])
    for name in senders:
        if name != cheat:
            made = attempt.ask(name, "mask", attempt.collector.envelopes_for(name), senders)
            attempt.collector.add_masked(name, attempt.federation.masked(name, made))
    survivors = attempt.collector.close_masked()
    for name in survivors:
        attempt.collector.add_confirmation(name, attempt.ask(name, "confirm", survivors))
    signed = attempt.collector.close_confirmations()
    for name in survivors:
        reveal = attempt.ask(name, "reveal", survivors, (cheat,), signed)
        attempt.collector.add_reveal(name, reveal)
    with pytest.raises(FalseMessage, match="committed to another pair secret") as false:
        attempt.collector.unmask()
    assert false.value.sender == cheat


@pytest.mark.parametrize("cheat", [MANY[0], MANY[-1]])
def test_a_site_that_wraps_nothing_that_can_be_opened_is_named_by_whom_it_is_for(
    cheat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = wrapping(cheat, lambda *_: bytes(WRAPPED_BYTES), monkeypatch)
    senders = attempt.close_without([])
    for name in senders:
        envelopes = attempt.collector.envelopes_for(name)
        picked, was_picked = cheat in attempt.holders(name), name in attempt.holders(cheat)
        if was_picked and (not picked or cheat == MANY[0]):
            with pytest.raises(FalseMessage, match=f"of {cheat} was not wrapped") as false:
                attempt.ask(name, "mask", envelopes, senders)
            assert false.value.sender == cheat
            assert attempt.federation.states[name].senders == [], "nothing of it is remembered"
        elif name != cheat:
            attempt.ask(name, "mask", envelopes, senders)

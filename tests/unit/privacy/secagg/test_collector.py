"""The coordinator names who sends something false, and goes on with the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg import member
from lepton_fed.privacy.secagg.collector import Collector, TooFew
from lepton_fed.privacy.secagg.messages import Confirmation, FalseMessage, Reveal
from tests.unit.privacy.secagg.test_protocol import ROUND, SIZE, Federation

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

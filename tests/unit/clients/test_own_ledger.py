"""A site's ledger in its runs: heads in receipts, one budget for several coordinators and names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients.agent import Agent
from lepton_fed.clients.own_ledger import head_in, open_ledger, signed_properly
from lepton_fed.clients.receipts import Receipts
from lepton_fed.clients.trainer import Trainer
from lepton_fed.config.schema import Budget, LedgerFiles, Privacy, RecordPrivacy
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Offer
from lepton_fed.identity.keys import generate_key
from lepton_fed.privacy.ledger.chain import Chain
from tests.ledger_entries import charges_in, entries_in
from tests.unit.clients.conftest import agreement_for, ask_for

DP = Privacy(RecordPrivacy(enabled=True, epsilon=2.5, delta=1e-5, clip=0.5))


class InProcess:
    """The training child without a process of its own."""

    def __init__(self, conf):
        self._trainer = Trainer(conf)
        self._ready = ""

    def begin(self, agreement):
        if self._ready != agreement.digest:
            self._ready = ""
            self._trainer.begin(agreement)
            self._ready = agreement.digest

    def answer(self, site, ask, limit_s):
        return replace(self._trainer._site.answer(ask), site=site)

    def budget_left(self):
        return self._trainer.budget_left()

    def close(self):
        self._trainer.close()


@pytest.fixture
def start(conf, parties):
    """Start agents of the site, as after a restart of its processes."""

    def one(conf=conf):
        return Agent(
            conf,
            parties.key,
            parties.node_key,
            parties.coordinator.public_key(),
            InProcess(conf),
        )

    return one


@pytest.fixture
def offer(parties):
    return lambda agreement: Offer(canonical_json(agreement), parties.signed())


def receipts(conf):
    return Receipts(Path(conf.state) / "receipts")


def private(run, rounds=2, **changes):
    return agreement_for(run, privacy=DP, rounds=rounds, **changes)


def test_a_receipt_of_a_private_round_says_where_the_ledger_stood(start, offer, conf, parties):
    site, plain, agreement = start(), agreement_for("plain"), private("private")
    for each in (plain, agreement):
        site.offered(offer(each))
        assert site.asked(ask_for(each)).update is not None
    without, within = receipts(conf).read()
    assert without.ledger == ""
    ledger = open_ledger(conf)
    head = head_in(receipts(conf))
    assert head == ledger.book.head
    assert ledger.entries()[-1].body["kind"] == "charged"
    assert signed_properly(within.ledger, parties.identity)
    assert not signed_properly(within.ledger, parties.coordinator.public_key())
    assert not signed_properly(within.ledger.replace(head.hash, "0" * 64), parties.identity)
    assert not signed_properly("", parties.identity)


def test_a_changed_ledger_lets_nothing_leave(start, offer, conf):
    site, agreement = start(), private("run-1")
    site.offered(offer(agreement))
    assert site.asked(ask_for(agreement)).update is not None
    path = Path(conf.state) / "ledger.sqlite"
    whole = path.read_bytes()
    place = whole.index(b'"kind":"charged"')
    path.write_bytes(whole[:place] + b'"kind":"chArged"' + whole[place + 16 :])
    reply = site.asked(ask_for(agreement, 2))
    assert (reply.update, reply.refusal.code) == (None, "LF4204")
    assert "ledger" not in reply.refusal.what, "how the site keeps its records is its own business"
    assert start().offered(offer(agreement)).refusal.code == "LF4204"
    path.write_bytes(whole)
    assert start().offered(offer(agreement)).agreement == agreement.digest


def test_an_older_copy_of_the_ledger_is_known_from_the_receipts(start, offer, conf):
    site, agreement = start(), private("run-1", rounds=3)
    site.offered(offer(agreement))
    site.asked(ask_for(agreement))
    path = Path(conf.state) / "ledger.sqlite"
    older = path.read_bytes()
    site.asked(ask_for(agreement, 2))
    path.write_bytes(older)
    assert start().offered(offer(agreement)).refusal.code == "LF4209"
    assert start().offered(offer(private("another"))).refusal.code == "LF4209"
    path.unlink()
    assert start().offered(offer(agreement)).refusal.code == "LF4210"
    path.with_suffix(".key").unlink()
    assert start().offered(offer(agreement)).refusal.code == "LF4209"


def test_a_run_that_does_not_fit_is_refused_before_its_first_round_and_costs_nothing(
    start, offer, conf
):
    site, fits, too_much = start(), private("fits"), private("too-much")
    site.offered(offer(fits))
    for number in (1, 2):
        assert site.asked(ask_for(fits, number)).update is not None
    reply = site.offered(offer(too_much))
    assert (reply.agreement, reply.refusal.code) == ("", "LF4207")
    assert reply.refusal.what == "the data set's budget does not allow this run"
    assert [body["run"] for body in charges_in(Path(conf.state))] == ["fits"] * 2
    assert site.asked(ask_for(too_much)).refusal.code == "LF4501"


def test_two_coordinators_have_one_budget_in_one_file(start, offer, conf, tmp_path):
    shared = LedgerFiles(file=str(tmp_path / "shared" / "ledger.sqlite"))
    one = replace(conf, ledger=shared)
    two = replace(conf, ledger=shared, state=str(tmp_path / "two"), coordinator="other:9092")
    first, second = start(one), start(two)
    assert first.offered(offer(private("run-1"))).agreement
    assert second.offered(offer(private("run-2"))).refusal.code == "LF4207"
    assert first.offered(offer(agreement_for("run-1", seed=9, privacy=DP))).agreement
    assert len(entries_in(tmp_path / "shared", "released")) == 1
    assert not (Path(two.state) / "ledger.sqlite").exists()
    open_ledger(one).release("run-1", "the owner")
    assert second.offered(offer(private("run-2"))).agreement


def test_another_name_for_the_same_rows_is_no_fresh_budget(start, offer, conf, tmp_path):
    site, agreement = start(), private("run-1")
    site.offered(offer(agreement))
    for number in (1, 2):
        site.asked(ask_for(agreement, number))
    spent = open_ledger(conf).spent
    with np.load(tmp_path / "rows.npz") as held:
        inputs, labels = held["inputs"], held["label"]
    again = replace(
        conf,
        budget=Budget(dataset="fresh", epsilon=3.0),
        source=replace(conf.source, path=str(tmp_path / "shuffled.npz")),
    )
    np.savez(again.source.path, inputs=inputs[::-1].astype(np.float64), label=1 - labels[::-1])
    assert start(again).offered(offer(private("run-2"))).refusal.code == "LF4207"
    others = replace(again, source=replace(conf.source, path=str(tmp_path / "others.npz")))
    np.savez(others.source.path, inputs=inputs + 1, label=labels)
    assert start(others).offered(offer(private("run-3"))).agreement
    ledger = open_ledger(others)
    assert (ledger.spent, 0 < spent <= 2.5) == (0, True)


def test_augmented_content_under_the_same_name_goes_on_with_its_spend(start, offer, conf, tmp_path):
    site, agreement = start(), private("run-1")
    site.offered(offer(agreement))
    for number in (1, 2):
        site.asked(ask_for(agreement, number))
    with np.load(tmp_path / "rows.npz") as held:
        inputs, labels = held["inputs"], held["label"]
    np.savez(tmp_path / "rows.npz", inputs=inputs + 1e-3, label=labels)
    assert start().offered(offer(private("run-2"))).refusal.code == "LF4207"


def test_the_head_is_kept_in_the_second_place_and_an_unmounted_one_stops_training(
    start, offer, conf, tmp_path
):
    place = tmp_path / "disk" / "head"
    place.parent.mkdir()
    kept = replace(conf, ledger=LedgerFiles(head=str(place)))
    agreement = private("run-1")
    site = start(kept)
    site.offered(offer(agreement))
    assert site.asked(ask_for(agreement)).update is not None
    head = Chain(Path(conf.state) / "ledger.sqlite").head()
    assert place.read_bytes() == canonical_json({"number": head.number, "hash": head.hash}) + b"\n"
    place.parent.rename(tmp_path / "unmounted")
    reply = site.asked(ask_for(agreement, 2))
    assert (reply.update, reply.refusal.code) == (None, "LF4211")
    assert len(charges_in(Path(conf.state))) == 1


def test_a_ledger_of_the_former_format_is_not_forgotten(start, offer, conf):
    Path(conf.state).mkdir()
    (Path(conf.state) / "ledger.jsonl").write_text("{}\n")
    assert start().offered(offer(private("run-1"))).refusal.code == "LF4208"
    assert start().offered(offer(agreement_for())).agreement, "without DP nothing is spent"


def test_receipts_signed_with_a_key_that_was_replaced_still_tell(start, offer, conf, parties):
    from lepton_fed.clients.own_ledger import check_receipts

    site, agreement = start(), private("run-1")
    site.offered(offer(agreement))
    site.asked(ask_for(agreement))
    ledger = open_ledger(conf)
    assert check_receipts(conf, ledger) == (1, 1)
    folder = Path(conf.identity_key).parent
    generate_key(folder / "new.pem")
    renewed = replace(conf, identity_key=str(folder / "new.pem"))
    assert check_receipts(renewed, ledger) == (1, 0)


def test_looking_at_a_ledger_never_asks_for_rows(conf):
    ledger = open_ledger(conf)
    assert ledger.spent == 0
    with pytest.raises(ValueError, match="no run has said"):
        list(open_ledger(replace(conf, source=replace(conf.source, reader="other")))._rows.read())


def test_a_run_whose_noise_takes_more_than_the_owner_allows_is_refused_when_it_is_offered(
    start, offer, conf
):
    record = replace(DP.record, mechanism="dp_ftrl", sampler="full", band=3)
    agreement = agreement_for("ftrl", privacy=Privacy(record), rounds=9)
    site = start(replace(conf, policy=replace(conf.policy, noise_bytes=3)))
    assert site.offered(offer(agreement)).refusal.code == "LF4623"
    assert start().offered(offer(agreement)).agreement == agreement.digest

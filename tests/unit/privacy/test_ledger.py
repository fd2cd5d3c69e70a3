"""The ledger: reserved and charged before use, kept over restarts, never beyond the budget."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import BudgetExceeded, Refused
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.ledger import Ledger
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.chain import GENESIS, Head, entry_hash
from lepton_fed.privacy.ledger.rows import KnownRows, in_common
from tests.ledger_entries import entries_in

EVENT = SampledGaussian(1.0, 0.05, 20)
RUN = RunName("run", "a" * 64, "coordinator")
OTHER = RunName("other", "b" * 64, "another coordinator")
DELTA = 1e-5
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Kept:
    """A second place, in memory."""

    place = "/mnt/other-disk/head"

    def __init__(self):
        self.head = None

    def read(self):
        return self.head

    def write(self, head):
        self.head = head


@pytest.fixture
def opened(tmp_path):
    def one(epsilon=8.0, dataset="main", content="c" * 64, rows=None, **more):
        known = None
        if rows is not None:
            known = KnownRows(tmp_path / "state" / "ledger.key", lambda: rows)
        return Ledger(
            tmp_path / "state" / "ledger.sqlite",
            dataset=dataset,
            content=content,
            epsilon=epsilon,
            delta=DELTA,
            rows=known,
            now=lambda: NOW,
            **more,
        )

    return one


def cost(*events):
    return epsilon_of(events, DELTA)


def charge(ledger, number=1, run=RUN, event=EVENT):
    return ledger.charge(event, run, number, "t" * 64)


def kinds(tmp_path):
    return [body["kind"] for body in entries_in(tmp_path / "state")]


def test_a_new_ledger_has_spent_nothing_and_nothing_is_written_to_look_at_it(opened, tmp_path):
    ledger = opened()
    assert (ledger.spent, ledger.left) == (0, 8.0)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_the_owner_s_alone(opened, tmp_path):
    charge(opened(rows=[b"1"]))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    assert modes == {"ledger.sqlite": 0o600, "ledger.key": 0o600}


def test_each_charge_says_what_is_spent_once_it_has_run(opened):
    ledger = opened()
    costs = [charge(ledger, number) for number in (1, 2, 3)]
    assert costs == [cost(*[EVENT] * n) for n in (1, 2, 3)]
    assert ledger.spent == costs[-1]
    assert ledger.left == 8.0 - costs[-1]
    assert ledger.of_run(RUN.agreement) == [EVENT] * 3
    assert ledger.of_run(OTHER.agreement) == []


def test_what_was_spent_is_kept_over_restarts_runs_and_coordinators(opened):
    charge(opened())
    assert opened().spent == cost(EVENT)
    other = SampledGaussian(2.0, 0.1, 5)
    assert charge(opened(), run=OTHER, event=other) == cost(EVENT, other)


def test_a_budget_that_was_made_smaller_than_what_is_spent_has_nothing_left(opened):
    charge(opened())
    assert opened(epsilon=0.01).left == 0.0


def test_a_round_beyond_the_budget_is_refused_and_nothing_is_written(opened, tmp_path):
    ledger = opened(epsilon=cost(EVENT))
    charge(ledger)
    before = kinds(tmp_path)
    for _ in range(2):
        with pytest.raises(BudgetExceeded) as caught:
            charge(ledger, 2)
        assert caught.value.code == "LF4201"
    assert kinds(tmp_path) == before
    assert ledger.spent == cost(EVENT)
    assert charge(opened(epsilon=cost(EVENT, EVENT)), 2) == cost(EVENT, EVENT)


def test_an_event_without_noise_never_fits(opened):
    with pytest.raises(BudgetExceeded):
        charge(opened(epsilon=1e300), event=SampledGaussian(0.0, 0.1, 1))


def test_an_accepted_run_sets_its_whole_cost_aside(opened):
    ledger = opened()
    ledger.reserve(EVENT, RUN, 3)
    assert ledger.spent == 0
    assert ledger.left == 8.0 - cost(*[EVENT] * 3)
    for number in (1, 2, 3):
        charge(ledger, number)
        assert opened().left == 8.0 - cost(*[EVENT] * 3)


def test_two_runs_cannot_each_fit_alone_and_overspend_together(opened, tmp_path):
    budget = cost(*[EVENT] * 4)
    opened(budget).reserve(EVENT, RUN, 3)
    before = kinds(tmp_path)
    with pytest.raises(BudgetExceeded) as caught:
        opened(budget).reserve(EVENT, OTHER, 2)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF4207", "budget.epsilon")
    assert kinds(tmp_path) == before
    with pytest.raises(BudgetExceeded):
        charge(opened(cost(*[EVENT] * 3)), run=OTHER)  # without a reservation neither
    opened(budget).reserve(EVENT, OTHER, 1)
    for number in (1, 2, 3):
        charge(opened(budget), number)
    assert charge(opened(budget), run=OTHER) == budget


def test_a_run_that_is_offered_again_goes_on_with_what_it_has_reserved(opened, tmp_path):
    budget = cost(*[EVENT] * 3)
    opened(budget).reserve(EVENT, RUN, 3)
    charge(opened(budget))
    opened(budget).reserve(EVENT, RUN, 3)
    assert kinds(tmp_path) == ["opened", "dataset", "reserved", "charged"]
    assert opened(budget).left == 0


def test_an_owner_who_lowers_the_budget_stops_a_run_that_was_accepted(opened):
    opened().reserve(EVENT, RUN, 3)
    charge(opened())
    with pytest.raises(BudgetExceeded) as caught:
        opened(cost(EVENT)).reserve(EVENT, RUN, 3)
    assert caught.value.code == "LF4207"
    with pytest.raises(BudgetExceeded):
        charge(opened(cost(EVENT)), 2)


def test_rounds_that_passed_without_the_site_are_free_again(opened):
    ledger = opened()
    ledger.reserve(EVENT, RUN, 5)
    charge(ledger, 4)
    assert ledger.left == 8.0 - cost(EVENT, EVENT), "the fourth, and the fifth that may come"
    charge(ledger, 5)
    assert ledger.left == 8.0 - cost(EVENT, EVENT)


def test_a_round_that_is_trained_twice_is_charged_twice_and_uses_up_another(opened):
    ledger = opened(cost(*[EVENT] * 3))
    ledger.reserve(EVENT, RUN, 3)
    for number in (1, 1, 2):
        charge(ledger, number)
    assert ledger.left == 0
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)


def test_a_coordinator_that_begins_another_run_has_what_the_one_before_did_not_use(
    opened, tmp_path
):
    budget = cost(*[EVENT] * 4)
    opened(budget).reserve(EVENT, RUN, 3)
    charge(opened(budget))
    following = replace(RUN, run="following", agreement="f" * 64)
    opened(budget).reserve(EVENT, following, 3)
    released = entries_in(tmp_path / "state", "released")
    assert [(body["run"], body["rounds"]) for body in released] == [("run", 2)]
    with pytest.raises(BudgetExceeded):
        opened(budget).reserve(EVENT, RUN, 5)
    opened(budget).reserve(EVENT, RUN, 3)  # resumed, and the other one is over
    assert opened(budget).left == budget - cost(*[EVENT] * 3)


def test_a_run_that_does_not_fit_frees_nothing(opened, tmp_path):
    budget = cost(*[EVENT] * 3)
    opened(budget).reserve(EVENT, RUN, 3)
    with pytest.raises(BudgetExceeded):
        opened(budget).reserve(EVENT, replace(RUN, agreement="f" * 64), 4)
    assert entries_in(tmp_path / "state", "released") == []
    assert opened(budget).left == 0


def test_the_owner_can_free_what_an_abandoned_run_has_reserved(opened, tmp_path):
    ledger = opened()
    ledger.reserve(EVENT, RUN, 3)
    charge(ledger)
    assert ledger.release("nothing", "the owner") == []
    (freed,) = opened().release("run", "the owner")
    assert (freed.name, freed.remaining) == (RUN, 2)
    assert ledger.left == 8.0 - cost(EVENT)
    assert opened().release("run", "the owner") == []
    assert entries_in(tmp_path / "state", "released")[0]["why"] == "the owner"


def test_changed_content_under_a_known_name_goes_on_with_its_spend(opened, tmp_path):
    charge(opened())
    changed = opened(content="e" * 64)
    assert changed.spent == cost(EVENT)
    assert charge(changed, 2) == cost(EVENT, EVENT)
    contents = [body["content"] for body in entries_in(tmp_path / "state", "charged")]
    assert contents == ["c" * 64, "e" * 64], "each entry says which"


def rows(*numbers):
    return [b"row %d" % number for number in numbers]


def test_a_new_name_that_shares_no_row_starts_at_nothing(opened):
    charge(opened(rows=rows(1, 2, 3)))
    other = opened(dataset="other", content="o" * 64, rows=rows(4, 5))
    assert charge(other) == cost(EVENT)


def test_a_new_name_that_shares_a_row_has_spent_what_it_has(opened):
    charge(opened(rows=rows(1, 2, 3)))
    renamed = opened(dataset="renamed", content="o" * 64, rows=rows(9, 3, 8))
    renamed.reserve(EVENT, OTHER, 1)
    assert renamed.spent == cost(EVENT)
    assert charge(renamed, run=OTHER) == cost(EVENT, EVENT)
    first = opened(rows=rows(1, 2, 3))
    assert first.spent == cost(EVENT, EVENT), "the row has paid under both names"
    charge(first, 2)
    assert renamed.spent == cost(*[EVENT] * 3), "and goes on paying"


def test_of_names_that_share_no_row_with_each_other_the_largest_spend_counts(opened):
    charge(opened(rows=rows(1, 2)))
    large = opened(dataset="large", content="l" * 64, rows=rows(3, 4))
    for number in (1, 2):
        charge(large, number)
    both = opened(dataset="both", content="b" * 64, rows=rows(2, 3))
    charge(both, run=OTHER)
    assert both.spent == cost(*[EVENT] * 3), "row 3 paid three times, row 2 twice"
    assert opened(rows=[]).spent == cost(EVENT, EVENT)
    assert large.spent == cost(*[EVENT] * 3)


def test_a_row_that_is_under_three_names_has_paid_under_all(opened):
    for name in ("one", "two", "three"):
        charge(opened(dataset=name, content=name * 20, rows=rows(7, len(name))))
    assert opened(dataset="one").spent == cost(*[EVENT] * 3)


def test_rows_that_are_added_to_a_known_name_are_looked_up_too(opened):
    charge(opened(rows=rows(1)))
    grown = {"dataset": "grown", "rows": rows(5)}
    charge(opened(content="g" * 64, **grown))
    assert opened(dataset="grown").spent == cost(EVENT)
    grown["rows"] = rows(5, 1)
    charge(opened(content="h" * 64, **grown), 2)
    assert opened(dataset="grown").spent == cost(*[EVENT] * 3)
    assert opened().spent == cost(*[EVENT] * 3)


def test_a_row_is_stored_once_in_eight_bytes_and_not_in_clear(opened, tmp_path):
    many = rows(*range(5000))
    charge(opened(rows=many))
    charge(opened(content="e" * 64, rows=[*many, b"new"]), 2)
    seen = entries_in(tmp_path / "state", "dataset")
    assert [body["rows"] for body in seen] == [5000, 5001]
    content = (tmp_path / "state" / "ledger.sqlite").read_bytes()
    assert len(content) < 5000 * 8 * 1.2 + 40_000
    assert b"row 4999" not in content


def test_the_rows_are_read_only_when_the_content_is_new(opened, tmp_path):
    read = []

    def reading():
        read.append(1)
        return rows(1)

    known = KnownRows(tmp_path / "state" / "ledger.key", reading)
    for number in (1, 2):
        ledger = opened()
        ledger._rows = known
        charge(ledger, number)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({}, []),
        ({"a": [9]}, []),
        ({"a": [1], "b": [2]}, [["a"], ["b"]]),
        ({"a": [1, 2], "b": [2, 3]}, [["a", "b"]]),
        ({"a": [1], "b": [2], "c": [1, 2, 3]}, [["a", "c"], ["b", "c"]]),
    ],
)
def test_the_largest_sets_of_names_that_a_row_is_under(others, found):
    held = {name: np.array(sorted(values), np.uint64) for name, values in others.items()}
    assert in_common(np.array([1, 2, 3], np.uint64), held) == found


def test_without_the_key_new_rows_are_not_taken(opened, tmp_path):
    charge(opened(rows=rows(1)))
    key = tmp_path / "state" / "ledger.key"
    secret = key.read_bytes()
    key.write_bytes(bytes(32))
    for code in ("LF4210", "LF4210"):
        with pytest.raises(Refused) as caught:
            charge(opened(content="e" * 64, rows=rows(2)))
        assert caught.value.code == code
        key.unlink(missing_ok=True)
    key.write_bytes(secret)
    key.chmod(0o644)
    with pytest.raises(Refused) as caught:
        charge(opened(content="e" * 64, rows=rows(2)))
    assert caught.value.code == "LF4152"
    key.chmod(0o600)
    charge(opened(content="e" * 64, rows=rows(2)))


def test_a_ledger_that_is_gone_is_refused_where_one_was_kept(opened, tmp_path):
    charge(opened(rows=rows(1)))
    path = tmp_path / "state" / "ledger.sqlite"
    for empty in (False, True):
        path.unlink(missing_ok=True)
        if empty:
            path.touch()
        with pytest.raises(Refused) as caught:
            opened(rows=rows(1))
        assert caught.value.code == "LF4210"


def test_the_head_is_kept_in_a_second_place_after_each_entry(opened):
    keeper = Kept()
    ledger = opened(keeper=keeper)
    ledger.reserve(EVENT, RUN, 3)
    charge(ledger)
    assert keeper.head == ledger.book.head
    assert ledger.book.head_kept_at == {keeper.place}
    opened(keeper=keeper)


@pytest.mark.parametrize("known", ["keeper", "noted"])
def test_an_older_copy_is_refused_until_the_owner_accepts_it(opened, tmp_path, known):
    keeper, path = Kept(), tmp_path / "state" / "ledger.sqlite"
    charge(opened(keeper=keeper))
    copy = path.read_bytes()
    newest = opened(keeper=keeper)
    charge(newest, 2)
    path.write_bytes(copy)
    head = newest._book.head
    given = {"keeper": keeper} if known == "keeper" else {"noted": [head]}
    with pytest.raises(Refused) as caught:
        opened(**given)
    assert caught.value.code == "LF4209"
    with pytest.raises(Refused):
        charge(newest, 3), "also while it is open"
    assert opened().spent == cost(EVENT), "without either nothing tells"
    assert opened(check_heads=False, **given).accept_older_copy() == [head]
    assert charge(opened(**given), 3) == cost(EVENT, EVENT)
    (said,) = [b for b in entries_in(tmp_path / "state", "acknowledged") if "known" in b]
    assert (said["known"], said["hash"]) == (head.number, head.hash)


def test_a_ledger_that_another_process_writes_to_meanwhile_is_no_older_copy(opened):
    keeper = Kept()
    busy = opened(keeper=keeper)
    charge(busy)

    class Late(Kept):
        def read(self):
            if keeper.head.number == number:
                charge(busy, 2)  # just before the second place is read
            return keeper.read()

    number = keeper.head.number
    assert opened(keeper=Late()).spent == cost(EVENT, EVENT)


def test_another_ledger_in_its_place_is_refused(opened, tmp_path):
    keeper, path = Kept(), tmp_path / "state" / "ledger.sqlite"
    charge(opened(keeper=keeper))
    path.unlink()
    with pytest.raises(Refused) as caught:
        opened(keeper=keeper)
    assert caught.value.code == "LF4209"
    for number in range(9):
        charge(opened(), number)  # by one who does not know of the second place
    with pytest.raises(Refused) as caught:
        opened(keeper=keeper)
    assert caught.value.code == "LF4209"


def test_a_second_place_that_does_not_say_it_any_more_is_refused_until_it_is_accepted(opened):
    keeper = Kept()
    charge(opened(keeper=keeper))
    keeper.head = None
    with pytest.raises(Refused) as caught:
        opened(keeper=keeper)
    assert caught.value.code == "LF4211"
    assert opened(keeper=keeper, check_heads=False).accept_older_copy() == []
    assert charge(opened(keeper=keeper), 2) == cost(EVENT, EVENT)


def test_accepting_what_lacks_nothing_writes_nothing(opened, tmp_path):
    keeper = Kept()
    charge(opened(keeper=keeper))
    before = kinds(tmp_path)
    assert opened(keeper=keeper).accept_older_copy() == []
    assert kinds(tmp_path) == before


def test_a_second_place_may_be_named_later(opened):
    charge(opened())
    keeper = Kept()
    charge(opened(keeper=keeper), 2)
    assert keeper.head.number == 5


def test_a_head_that_cannot_be_kept_lets_nothing_leave_and_is_counted(opened, monkeypatch):
    keeper = Kept()
    ledger = opened(keeper=keeper)
    charge(ledger)

    def full(head):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(keeper, "write", full)
    with pytest.raises(OSError, match="No space"):
        charge(ledger, 2)
    monkeypatch.undo()
    assert charge(ledger, 3) == cost(*[EVENT] * 3)


def test_an_entry_is_canonical_json_chained_by_its_hash(opened, tmp_path):
    charge(opened(rows=rows(1)))
    before = GENESIS
    for number, entry in enumerate(opened().entries(), start=1):
        assert entry.body["previous"] == before
        assert (entry.number, entry.body["number"]) == (number, number)
        assert entry.body["time"] == "2026-11-20T12:00:00+00:00"
        assert (
            canonical_json(dict(entry.body)) in (tmp_path / "state" / "ledger.sqlite").read_bytes()
        )
        before = entry_hash(entry.body)
        assert entry.hash == before
    assert opened().book.head == Head(number, before)


def test_a_closed_ledger_charges_nothing(opened):
    ledger = opened()
    ledger.close()
    with pytest.raises(Refused) as caught:
        charge(ledger)
    assert caught.value.code == "LF4202"
    assert opened().entries() == []


def test_an_open_ledger_sees_what_another_process_wrote(opened):
    one, two = opened(cost(EVENT)), opened(cost(EVENT))
    charge(one)
    assert (two.spent, two.left) == (cost(EVENT), 0)
    with pytest.raises(BudgetExceeded):
        charge(two, run=OTHER)


def test_no_file_is_held_open(opened):
    ledger = opened()
    charge(ledger)
    held = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
    assert not [name for name in held if "ledger" in name]

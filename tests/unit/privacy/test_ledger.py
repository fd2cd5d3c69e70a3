"""The ledger: charged before use, kept over restarts, never beyond the budget."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest

from lepton_fed.errors import BudgetExceeded, Refused
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.ledger import Ledger

DATASET = "d" * 64
EVENT = SampledGaussian(1.0, 0.05, 20)
ABOUT = {"run": "r", "round": 1, "task": "t"}
DELTA = 1e-5


def opened(path, epsilon=8.0, dataset=DATASET):
    return Ledger(path, dataset=dataset, epsilon=epsilon, delta=DELTA)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.jsonl"


def charge(path, events=(EVENT,), **named):
    ledger = opened(path, **named)
    try:
        return [ledger.charge(event, ABOUT) for event in events]
    finally:
        ledger.close()


def spent(path, **named):
    ledger = opened(path, **named)
    try:
        return ledger.spent
    finally:
        ledger.close()


def test_a_new_ledger_has_spent_nothing_and_is_the_owner_s_alone(path):
    assert spent(path) == 0
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_budget_that_was_made_smaller_than_what_is_spent_has_nothing_left(path):
    charge(path)
    ledger = opened(path, epsilon=0.01)
    assert (ledger.left, ledger.spent > 0.01) == (0.0, True)
    ledger.close()


def test_each_charge_says_what_is_spent_once_it_has_run(path):
    ledger = opened(path)
    costs = [ledger.charge(EVENT, {**ABOUT, "round": number}) for number in (1, 2, 3)]
    assert costs == [epsilon_of([EVENT] * n, DELTA) for n in (1, 2, 3)]
    assert ledger.spent == costs[-1]
    assert ledger.left == 8.0 - costs[-1]
    assert ledger.delta == DELTA
    ledger.close()


def test_what_was_spent_is_kept_over_restarts(path):
    first = charge(path)[0]
    assert spent(path) == first
    other = SampledGaussian(2.0, 0.1, 5)
    assert charge(path, [other])[0] == epsilon_of([EVENT, other], DELTA)
    assert spent(path) == epsilon_of([EVENT, other], DELTA)


def test_a_charge_is_on_disk_before_it_is_answered(path, monkeypatch):
    ledger = opened(path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    ledger.charge(EVENT, ABOUT)
    assert synced == [path.stat().st_size] != [0]
    ledger.close()


def test_the_name_of_a_new_ledger_is_synced_too(path, monkeypatch):
    folders = []

    def fsync(file):
        folders.append(os.path.samestat(os.fstat(file), path.parent.stat()))

    monkeypatch.setattr(os, "fsync", fsync)
    opened(path).close()
    assert folders == [True]


def test_a_line_says_what_it_was_for_and_holds_no_row(path):
    charge(path)
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["about"] == ABOUT
    assert set(record) == {
        "about", "adjacency", "dataset", "hash", "noise_multiplier", "previous", "sampler",
        "sampling_rate", "steps",
    }  # fmt: skip


def test_a_round_beyond_the_budget_is_refused_and_writes_nothing(path):
    budget = epsilon_of([EVENT] * 2, DELTA)
    ledger = opened(path, epsilon=budget)
    assert ledger.charge(EVENT, ABOUT) < budget
    assert ledger.charge(EVENT, ABOUT) == budget, "the budget may be spent to its end"
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded) as caught:
        ledger.charge(EVENT, ABOUT)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF4201", str(path))
    assert f"the budget is {budget:g}" in problem.what
    assert path.read_bytes() == before
    assert ledger.spent == budget
    # A smaller step that still fits is not shut out by the refusal.
    ledger.close()
    reopened = opened(path, epsilon=budget * 1.2)
    assert reopened.charge(SampledGaussian(5.0, 0.01, 1), ABOUT) <= budget * 1.2
    reopened.close()


def test_steps_without_noise_fit_no_budget(path):
    ledger = opened(path, epsilon=1e300)
    with pytest.raises(BudgetExceeded):
        ledger.charge(SampledGaussian(0.0, 0.1, 1), ABOUT)
    ledger.close()
    assert path.read_bytes() == b""


def test_a_budget_cut_below_what_was_spent_allows_nothing_more(path):
    charge(path, [EVENT] * 3)
    with pytest.raises(BudgetExceeded):
        charge(path, [SampledGaussian(100.0, 0.001, 1)], epsilon=0.5)


def test_a_ledger_that_is_open_is_refused_in_the_same_process(path):
    ledger = opened(path)
    with pytest.raises(Refused) as caught:
        opened(path)
    assert caught.value.code == "LF4203"
    ledger.close()
    opened(path).close()


def test_a_ledger_that_another_process_holds_is_refused(path):
    path.parent.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
         "print('held', flush=True)\nsys.stdin.read()", path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refused) as caught:
            opened(path)
        holder.stdin.close()
    assert caught.value.code == "LF4203"
    opened(path).close()


def test_a_refused_ledger_is_let_go(path):
    charge(path)
    for _ in range(3):
        with pytest.raises(Refused) as caught:
            opened(path, dataset="e" * 64)
        assert caught.value.code == "LF4205", "not LF4203: it must not stay locked"
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_ledger_of_other_data_is_refused(path):
    charge(path)
    with pytest.raises(Refused) as caught:
        opened(path, dataset="e" * 64)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF4205", f"{path}:1")


def test_a_closed_ledger_charges_nothing_and_writes_into_no_other_file(path, tmp_path):
    ledger = opened(path)
    ledger.close()
    ledger.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    with pytest.raises(Refused) as caught:
        ledger.charge(EVENT, ABOUT)
    assert caught.value.code == "LF4202"
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_a_child_process_does_not_inherit_the_file(path):
    ledger = opened(path)
    assert not os.get_inheritable(ledger._file)
    ledger.close()

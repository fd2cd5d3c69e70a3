"""The soak test's faults follow from its seed, and what grows is noticed."""

from __future__ import annotations

import os
from math import isnan

import pytest

from tests.faults.running import MASKED_SITES, PHASES
from tests.soak.samples import Bound, Sample, Series, measured
from tests.soak.schedule import KINDS, PHASED, schedule

ROUNDS = 200


def test_the_faults_are_a_pure_function_of_the_seed() -> None:
    assert schedule(7, ROUNDS) == schedule(7, ROUNDS)
    assert schedule(7, ROUNDS) != schedule(8, ROUNDS)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_fault_comes_several_times_and_the_last_rounds_are_quiet(seed: int) -> None:
    planned = schedule(seed, ROUNDS)
    after = [each.after_round for each in planned]
    assert after == sorted(set(after))
    assert after[-1] <= ROUNDS - 40
    for kind in KINDS:
        found = [each for each in planned if each.kind == kind]
        assert len(found) >= 3, kind
        sites = {each.site for each in found}
        assert sites <= ({""} if kind == "coordinator killed" else set(MASKED_SITES))
        if kind.startswith("line"):
            assert sites <= {"north", "south"}
    assert all(each.kind in PHASED for each in planned if each.phase)


def test_what_is_killed_as_a_phase_begins_is_killed_in_every_phase() -> None:
    planned = [each for seed in range(20) for each in schedule(seed, ROUNDS)]
    for kind in PHASED:
        assert {each.phase for each in planned if each.kind == kind} == {"", *PHASES}


def series(values: list[tuple[int, int, float]], leak: float | None = None) -> Series:
    found = Series(Bound(0.1, 1.0, leak), ROUNDS)
    for number, process, value in values:
        found.add(Sample(number, process, value))
    return found


def test_what_stays_as_it_is_is_flat() -> None:
    flat = series([(n, 9, 100.0 + n % 3) for n in range(1, ROUNDS + 1)])
    assert flat.complaints() == []
    assert abs(flat.slope()) < 0.01


def test_what_grows_from_quarter_to_quarter_is_not() -> None:
    within = series([(n, 0, 100.0 + (10.0 if n > 150 else 0.0)) for n in range(1, ROUNDS + 1, 7)])
    assert within.complaints() == [], "10 % and a little more are allowed"
    found = series([(n, 0, 100.0 + (50.0 if n > 150 else 0.0)) for n in range(1, ROUNDS + 1)])
    assert "in the second quarter" in found.complaints()[0]


def test_what_leaks_in_each_of_several_lives_is_not_flat() -> None:
    # Each process is killed after 40 rounds, so that no quarter has more than another.
    leak = series([(n, 1 + n // 40, 100.0 + (n % 40) * 0.5) for n in range(1, ROUNDS + 1)])
    second, last = leak.quarters()[1::2]
    assert last <= second * 1.1
    assert leak.slope() == pytest.approx(0.5)
    assert leak.complaints() == ["a process that lives for the whole run grows by 100.0"]
    assert leak.rows()[0] == (9, 1, 104.5)


def test_pools_that_fill_at_the_beginning_of_each_life_are_no_leak() -> None:
    lives = [(n, 1 + n // 40, min(n % 40, 15) * 1.0) for n in range(1, ROUNDS + 1)]
    assert series(lives).complaints() == []
    slow = [(n, 1 + n // 40, 100.0 + (n % 40) * 0.05) for n in range(1, ROUNDS + 1)]
    assert series(slow, leak=11.0).complaints() == []
    assert series(slow, leak=9.0).complaints()


def test_a_process_that_was_just_started_does_not_count_and_no_samples_are_not_flat() -> None:
    young = series([(n, 1 + n // 5, 10.0) for n in range(1, ROUNDS + 1)])
    assert all(isnan(quarter) for quarter in young.quarters())
    assert young.complaints()


def test_this_process_is_measured_and_a_gone_one_is_not() -> None:
    found = measured(os.getpid())
    assert found is not None
    assert found["memory"] > 1
    assert found["files"] >= 3
    assert found["threads"] >= 1
    assert measured(2**22 + 1) is None

"""Deadlines follow what sites took, not a table of timeouts."""

from __future__ import annotations

import pytest

from lepton_fed.core.pace import Deadline, Pace

MEGABYTE = 1_000_000


def test_in_the_first_round_half_of_the_cohort_sets_the_pace() -> None:
    deadline = Pace(3.0).deadline(["a", "b", "c"], 1000)
    assert not deadline.passed(3000, [])
    assert not deadline.passed(3000, [100.0])
    assert not deadline.passed(299, [90.0, 100.0])
    assert deadline.passed(301, [90.0, 100.0])


def test_who_refuses_at_once_does_not_set_the_pace() -> None:
    deadline = Pace(3.0).deadline(["a", "b", "c"], 1000)
    assert not deadline.passed(3000, [], refused=2)
    assert deadline.passed(301, [100.0], refused=2)


def test_later_rounds_expect_the_median_of_what_the_cohort_took() -> None:
    pace = Pace(2.0)
    for site, seconds in {"a": 30.0, "b": 50.0, "c": 4000.0}.items():
        pace.note(site, seconds)
    deadline = pace.deadline(["a", "b", "c"], 1000)
    assert deadline.allowed_s([]) == pytest.approx(100.0)
    assert deadline.allowed_s([1.0]) == pytest.approx(100.0)  # a quick one hurries nobody


def test_one_slow_site_does_not_stretch_the_deadline_of_the_others() -> None:
    pace = Pace(3.0)
    for site in "abcd":
        pace.note(site, 40.0)
    before = pace.deadline("abcde", 1000).allowed_s([])
    pace.note("e", 1e6)
    assert pace.deadline("abcde", 1000).allowed_s([]) == before


def test_a_large_model_is_given_the_time_to_travel() -> None:
    pace = Pace(1.0)
    pace.note("a", 1.0)
    small, large = (pace.deadline(["a"], n * MEGABYTE).allowed_s([]) for n in (1, 1000))
    assert (small, large) == (20.0, 2000.0)


def test_a_cohort_that_nobody_knows_yet_is_waited_for_as_in_the_first_round() -> None:
    pace = Pace(1.0)
    pace.note("a", 30.0)
    assert pace.deadline(["b", "c", "a"], 0).expected_s is None
    assert pace.deadline(["b", "a"], 0).expected_s == 30.0


def test_without_any_answer_the_first_round_ends_some_time() -> None:
    assert Deadline(2.0, 3).passed(7201.0, [])

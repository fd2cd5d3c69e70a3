from __future__ import annotations

import pytest

from lepton_fed.errors import ConfError, DataError, LeptonError, Problem
from lepton_fed.runs.checks import Check, Checklist


def failing(error: LeptonError) -> object:
    raise error


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    checks = Checklist()
    problem = Problem("LF2001", "a column is missing")
    assert checks.add("conf", lambda: 7, lambda found: f"{found} keys") == 7
    assert checks.add("data", lambda: failing(DataError(problem)), str) is None
    assert checks.add("key", lambda: "k", str) == "k"
    assert checks.checks == [
        Check("conf", "7 keys"),
        Check("data", problems=(problem,)),
        Check("key", "k"),
    ]


def test_all_problems_of_a_check_are_kept() -> None:
    problems = [Problem("LF1001", "one"), Problem("LF1002", "two")]
    checks = Checklist()
    checks.add("conf", lambda: failing(ConfError(problems)), str)
    assert checks.checks[0].problems == tuple(problems)


def test_the_exit_code_is_that_of_the_first_failure() -> None:
    checks = Checklist()
    assert checks.exit_code == 0
    checks.add("all well", lambda: 1, str)
    assert checks.exit_code == 0
    checks.add("data", lambda: failing(DataError(Problem("LF2001", "x"))), str)
    checks.add("conf", lambda: failing(ConfError(Problem("LF1001", "x"))), str)
    assert checks.exit_code == DataError.exit_code == 3


def test_a_mistake_of_the_program_is_not_a_finding() -> None:
    checks = Checklist()
    with pytest.raises(ZeroDivisionError):
        checks.add("data", lambda: 1 // 0, str)
    assert checks.checks == []

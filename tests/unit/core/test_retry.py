from __future__ import annotations

import pytest

from lepton_fed.core.retry import Retry
from lepton_fed.errors import Problem, Refused, RunError


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RunError(Problem("LF5209", "full")), True),
        (Refused(Problem("LF4164", "not valid yet")), True),
        (Refused(Problem("LF4166", "half")), False),
    ],
)
def test_what_may_pass_is_tried_again_until_it_turns_out_well(
    error: RunError | Refused, again: bool
) -> None:
    retry = Retry()
    assert not retry.due(False)
    assert retry.due(True)
    assert retry.failed(error)
    assert retry.due(False) is again
    assert not retry.failed(error), "told before"
    assert retry.due(True)
    assert retry.failed(error), "the files are others"
    retry.due(True)
    retry.succeeded()
    assert not retry.due(False)


def test_another_error_is_news_and_the_same_of_another_moment_is_not() -> None:
    retry = Retry()
    retry.due(True)
    assert retry.failed(RunError(Problem("LF5018", "locked for 5 s", where="a")))
    assert not retry.failed(RunError(Problem("LF5018", "locked for 6 s", where="a")))
    assert retry.failed(RunError(Problem("LF5209", "full", where="b")))


def test_what_raises_something_else_stays_due() -> None:
    retry = Retry()
    assert retry.due(True)
    assert retry.due(False)

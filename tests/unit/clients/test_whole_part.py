"""What a site's receipts say of its whole part in all its runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lepton_fed.clients.receipts import Receipt, VectorRecord
from lepton_fed.clients.whole_part import whole_part
from lepton_fed.privacy.client import CLAIM_AGAINST, CLAIM_DELTA, CLAIM_EPSILON

VECTOR = VectorRecord(2, 8, 2.0, 1.0, "0" * 64)
SHARED = "the coordinator, the other sites and whoever has the model"


def receipt(
    run: str, number: int, epsilon: float | None = None, delta: float = 1e-5, **changes: object
) -> Receipt:
    """Return the receipt of an update."""
    claims = {}
    if epsilon is not None:
        claims = {CLAIM_EPSILON: repr(epsilon), CLAIM_DELTA: repr(delta), CLAIM_AGAINST: SHARED}
    made = Receipt(
        f"2026-01-01T00:00:{number:02d}+00:00", "north", "words of a key", "host:1", run, number,
        "t", "p", f"agreement of {run}", {"delta": VECTOR}, {"weight": "1.0", **claims},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_run_counts_once_with_all_its_rounds_and_runs_add_up() -> None:
    told = [receipt("one", 1, 3.25), receipt("two", 1, 4.5, 1e-6), receipt("one", 2, 3.25)]
    told.append(receipt("one", 2, 3.25))  # another attempt at the round
    found = whole_part(told)
    assert [(run.run, run.rounds, run.epsilon, run.delta) for run in found.runs] == [
        ("one", 2, 3.25, 1e-5), ("two", 1, 4.5, 1e-6),
    ]  # fmt: skip
    assert {run.against for run in found.runs} == {SHARED}
    assert found.epsilon == 7.75
    assert found.delta == pytest.approx(1.1e-5)
    assert found.uncovered == 0


def test_a_run_that_was_agreed_to_anew_under_its_name_counts_again() -> None:
    again = receipt("one", 1, 3.0, agreement="another")
    found = whole_part([receipt("one", 1, 3.0), again])
    assert found.epsilon == 6.0


def test_a_run_without_it_is_listed_and_in_no_sum() -> None:
    found = whole_part([receipt("one", 1), receipt("two", 1, 4.5)])
    assert [run.epsilon for run in found.runs] == [None, 4.5]
    assert (found.epsilon, found.uncovered) == (4.5, 1)


def test_what_is_no_update_is_no_part() -> None:
    others = [
        receipt("one", 1, vectors={}, numbers={}, refusal="LF4605"),
        receipt("two", 1, numbers={"phase": "mask, attempt 1", "evaluation": "inside"}),
        receipt("three", 1, vectors={}, numbers={"phase": "share, attempt 1"}),
    ]
    found = whole_part(others)
    assert (found.runs, found.epsilon, found.uncovered) == ([], 0.0, 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (CLAIM_EPSILON, "nan"), (CLAIM_EPSILON, "-1"), (CLAIM_EPSILON, "inf"),
        (CLAIM_EPSILON, "much"), (CLAIM_DELTA, "1.0"), (CLAIM_DELTA, "nan"),
    ],
)  # fmt: skip
def test_what_no_site_writes_is_in_no_sum(name: str, said: str) -> None:
    one = receipt("one", 1, 3.0)
    with pytest.raises(ValueError):
        whole_part([replace(one, numbers={**one.numbers, name: said})])

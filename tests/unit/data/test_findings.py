"""How problems with data are gathered and worded."""

import numpy as np
import pytest

from lepton_fed.data.findings import Findings, Places, nearest, under
from lepton_fed.errors import DataError, Problem, TaskError, capped, quoted


def test_a_value_is_cut_after_forty_characters():
    assert quoted("x" * 40) == f'"{"x" * 40}"'
    assert quoted("x" * 41) == f'"{"x" * 40}..."'


def test_a_value_cannot_speak_to_the_terminal():
    shown = quoted("\x1b[2J\r\n\x9b31m\u202e")
    assert shown.isprintable()
    assert "\\x1b" in shown
    assert quoted("Zoë") == '"Zoë"'


def test_the_nearest_name_is_offered_or_else_all_of_them():
    assert nearest("agee", ["age", "weight"]) == 'did you mean "age"?'
    assert nearest("zzz", ["age", "weight"]) == 'known are "age", "weight"'
    assert nearest("zzz", [f"{n}" for n in range(12)]).endswith("and 2 more")
    assert nearest("zzz", []) == "there are none"


def test_one_column_of_many_bad_rows_is_one_problem():
    found = Findings("a.csv")
    bad = np.zeros(100, dtype=np.bool_)
    bad[[2, 5, 7, 11, 13, 17]] = True
    found.note_rows("LF2010", bad, lambda row: f"row {row} is bad", places=Places(), column="age")
    (problem,) = found.problems()
    assert problem.where == 'a.csv row 3 column "age"'
    assert problem.what == "row 2 is bad (also at row 6, row 8, row 12 and 2 more)"


def test_later_findings_of_the_same_kind_only_add_their_places():
    found = Findings("a.csv")
    for line in range(2, 9):
        found.note("LF2007", f"line {line}", places=Places([line]).of([0]))
    found.note("LF2007", "another column", column="age")
    first, second = found.problems()
    assert str(first) == "a.csv line 2: line 2 (also at line 3, line 4, line 5 and 3 more)"
    assert second.where == 'a.csv column "age"'


def test_no_finding_is_no_error_and_any_is_one():
    found = Findings("a.csv")
    found.note_rows("LF2010", np.zeros(3, np.bool_), lambda row: "never", places=Places())
    found.refuse()
    found.note("LF2013", "there are no rows")
    with pytest.raises(DataError, match="there are no rows"):
        found.refuse()


@pytest.mark.parametrize("count", [20, 21, 57])
def test_a_long_list_ends_with_the_number_of_problems_left_out(count):
    shown = capped([Problem("LF2001", str(n)) for n in range(count)], "LF2099")
    assert len(shown) == 20
    if count > 20:
        assert shown[-1] == Problem("LF2099", f"and {count - 19} more")


@pytest.mark.parametrize("kind", [DataError, TaskError])
def test_a_plugins_relative_key_is_completed(kind):
    problems = [
        Problem("LF3104", "relative", key="arguments.alpha"),
        Problem("LF3104", "complete", key="sites.partition.arguments.alpha"),
        Problem("LF3104", "without"),
    ]
    with pytest.raises(kind) as caught, under("sites.partition"):
        raise kind(problems)
    assert [problem.key for problem in caught.value.problems] == [
        "sites.partition.arguments.alpha",
        "sites.partition.arguments.alpha",
        "",
    ]

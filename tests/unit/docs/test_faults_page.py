"""The page of faults is what its tests say, and each of its rows is a test that is run."""

from __future__ import annotations

import ast

import pytest

from tests.faults.rows import FOLDER, Fault, all_rows, fault, rows_of
from tests.faults.table import PAGE, page


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == page(), "python -m tests.faults.table"


def test_every_fault_has_its_own_row_with_a_bound() -> None:
    found = all_rows()
    assert len({row.name for row in found}) == len(found) >= 19
    assert all(row.normal_s > 0 and row.sees and row.lost for row in found)


def test_every_test_of_a_fault_carries_a_row() -> None:
    for path in FOLDER.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = [each for each in node.decorator_list if isinstance(each, ast.Call)]
                names = [getattr(call.func, "id", "") for call in calls]
                assert "fault" in names, node.name


def test_a_row_marks_its_test_and_several_keep_their_order() -> None:
    about = {"where": "site", "sees": "s", "lost": "l", "normal_s": 1}

    @fault(name="upper", **about)  # type: ignore[arg-type]
    @fault(name="lower", **about)  # type: ignore[arg-type]
    def test_both() -> None:
        pass

    assert rows_of(test_both) == tuple(Fault(n, "site", "s", "l", 1) for n in ("upper", "lower"))
    marks = [mark.name for mark in test_both.pytestmark]  # type: ignore[attr-defined]
    assert set(marks) == {pytest.mark.faults.name}

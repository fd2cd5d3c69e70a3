"""The table of faults: each test carries its row, and the page is made from the rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import pytest

__all__ = ["Fault", "Rounds", "all_rows", "fault", "rounds_of", "rows_of"]

FOLDER = Path(__file__).parent
Rounds = Literal["masked", "plain"]
Where = Literal["site", "network", "coordinator"]
Test = TypeVar("Test", bound=Callable[..., None])
_ROWS = "fault_rows"


@dataclass(frozen=True)
class Fault:
    """A row of docs/reference/faults.md.

    Args:
        name: What happens.
        where: Where it happens: the page has a table for each.
        sees: What whoever looks is told, and where.
        lost: What is lost.
        normal_s: Seconds after which all is as before, once the fault itself is over; the test
            asserts it.
        rounds: The kinds of rounds that it is tried on.
    """

    name: str
    where: Where
    sees: str
    lost: str
    normal_s: float
    rounds: tuple[Rounds, ...] = ("masked",)


def fault(
    *,
    name: str,
    where: Where,
    sees: str,
    lost: str,
    normal_s: float,
    rounds: tuple[Rounds, ...] = ("masked",),
) -> Callable[[Test], Test]:
    """Give a test a row; several when it tries several faults at once, at different sites.

    The test is marked ``faults``; its fixture ``rows`` is its rows, the upper first.
    """
    row = Fault(name, where, sees, lost, normal_s, rounds)

    def carry(test: Test) -> Test:
        setattr(test, _ROWS, (row, *rows_of(test)))
        return pytest.mark.faults(test)

    return carry


def rows_of(test: object) -> tuple[Fault, ...]:
    """Return the rows that a test carries."""
    return tuple(getattr(test, _ROWS, ()))


def rounds_of(test: object) -> list[Rounds]:
    """Return the kinds of rounds that a test is for; masked ones when it has no row."""
    kinds = {kind for row in rows_of(test) for kind in row.rounds}
    return sorted(kinds) or ["masked"]


def all_rows() -> list[Fault]:
    """Return the rows of all tests of this folder, in their order."""
    found: list[Fault] = []
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(f"tests.faults.{path.stem}")
        for test in vars(module).values():
            found += rows_of(test) if callable(test) else ()
    return found

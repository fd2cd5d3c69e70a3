"""What is wrong with data, gathered: one problem per kind and column, with its first places.

A column of a million unreadable cells is one thing to mend, so it is one problem: the first cell is
shown in full, the next places are named, the rest is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lepton_fed.config.nearest import nearest as nearest_name
from lepton_fed.errors import DataError, Problem, TaskError, capped, quoted

__all__ = ["Findings", "Places", "nearest", "under"]

_SHOWN_PLACES = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a remedy that names what ``name`` was probably meant to be."""
    names = list(known)
    # The comparison takes quadratic time; a cell this long is nobody's typing error.
    close = nearest_name(name, names) if len(name) <= 100 else ""
    if close:
        return f"did you mean {quoted(close)}?"
    if not names:
        return "there are none"
    listed = ", ".join(quoted(each) for each in names[:10])
    return f"known are {listed}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"


@contextmanager
def under(key: str) -> Iterator[None]:
    """Complete the keys of errors: what a plug-in calls ``arguments.alpha`` has a longer name.

    Args:
        key: Conf key of the part that names the plug-in, for example ``sites.partition``.

    Raises:
        DataError, TaskError: The one that was raised inside, with full keys.
    """
    try:
        yield
    except (DataError, TaskError) as error:
        raise type(error)(
            [
                replace(problem, key=f"{key}.{problem.key}")
                if problem.key and key and not problem.key.startswith(key)
                else problem
                for problem in error.problems
            ]
        ) from error


class Places:
    """Names rows the way their owner finds them: by row from 1, or by line of a text file.

    Args:
        lines: Line of each row in its file, from 1; none where rows have no lines.
    """

    def __init__(self, lines: Sequence[int] | None = None) -> None:
        self._lines = lines

    def of(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[str]:
        """Return the names of the first few of ``rows`` (which count from 0)."""
        few = [int(row) for row in rows[:_SHOWN_PLACES]]
        if self._lines is None:
            return [f"row {row + 1}" for row in few]
        return [f"line {self._lines[row]}" for row in few]


@dataclass
class _Finding:
    what: str
    remedy: str
    places: list[str] = field(default_factory=list)
    count: int = 0


class Findings:
    """Collects what is wrong with one source of rows.

    Args:
        where: Names the source in the errors: a file, or ``built-in digits``.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._found: dict[tuple[str, str], _Finding] = {}

    def note(
        self,
        code: str,
        what: str,
        *,
        remedy: str = "",
        column: str = "",
        places: Sequence[str] = (),
        count: int = 1,
    ) -> None:
        """Note one finding; a later one with the same code and column only adds its places.

        Args:
            code: Error code.
            what: What is wrong at the first place, with the value.
            remedy: What to do.
            column: Name of the column, if one is to blame.
            places: The first places, as :class:`Places` names them.
            count: Number of places in all.
        """
        found = self._found.setdefault((code, column), _Finding(what, remedy))
        found.places.extend(places[: _SHOWN_PLACES - len(found.places)])
        found.count += count

    def note_rows(
        self,
        code: str,
        bad: npt.NDArray[np.bool_],
        what: Callable[[int], str],
        *,
        places: Places,
        remedy: str = "",
        column: str = "",
    ) -> None:
        """Note the rows that are marked as bad, if any.

        Args:
            code: Error code.
            bad: ``[rows]``, boolean.
            what: Says what is wrong with a row (counted from 0).
            places: Names the rows.
            remedy: What to do.
            column: Name of the column, if one is to blame.
        """
        rows = np.flatnonzero(bad)
        if rows.size:
            self.note(
                code,
                what(int(rows[0])),
                remedy=remedy,
                column=column,
                places=places.of(rows),
                count=int(rows.size),
            )

    def problems(self) -> list[Problem]:
        """Return what was found, at most 20 problems."""
        return capped(
            [self._problem(code, column, each) for (code, column), each in self._found.items()],
            "LF2099",
        )

    def refuse(self) -> None:
        """Do nothing if nothing was found.

        Raises:
            DataError: Something was found.
        """
        if self._found:
            raise DataError(self.problems())

    def _problem(self, code: str, column: str, found: _Finding) -> Problem:
        where = [self.where, *found.places[:1], f"column {quoted(column)}" if column else ""]
        also = ", ".join(found.places[1:])
        rest = found.count - len(found.places)
        if also:
            also = f" (also at {also}{f' and {rest} more' if rest > 0 else ''})"
        return Problem(
            code,
            f"{found.what}{also}",
            where=" ".join(part for part in where if part),
            remedy=found.remedy,
        )

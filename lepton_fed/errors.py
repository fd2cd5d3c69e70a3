"""The error tree: every error says what happened, where, and what to do.

LeptonError
  x ConfError               LF1xxx  exit 2   conf file, override or command line
  x DataError               LF2xxx  exit 3   a site's data does not fit the contract
  x TaskError               LF3xxx  exit 2   a task that cannot be trained as written
  x Refused                 LF4xxx  exit 4   a protection said no
    + BudgetExceeded
    + BundleRefused
    + UpdateRefused
  x RunError                LF5xxx  exit 5   a run that could not go on
  x MissingExtra            LF6xxx  exit 6   an optional dependency is not installed

Codes are listed in docs/reference/errors.md; a code is never given a second meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "BudgetExceeded",
    "BundleRefused",
    "ConfError",
    "DataError",
    "LeptonError",
    "MissingExtra",
    "Problem",
    "Refused",
    "RunError",
    "TaskError",
    "UpdateRefused",
    "capped",
    "quoted",
]

_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        code: Stable code, ``LF`` and four digits.
        what: What is wrong, with the value, in one sentence.
        where: ``file:line:column``, ``file row 3 column "age"``, or ``command line``; may be empty.
        key: Dotted conf key, when one is to blame; may be empty.
        remedy: What to do; may be empty.
    """

    code: str
    what: str
    where: str = ""
    key: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        # An override is its own place and already says its key.
        key = "" if f" {self.key}=" in self.where else self.key
        place = " ".join(part for part in (self.where, key) if part)
        lines = [f"{place}: {self.what}" if place else self.what]
        if self.remedy:
            lines.append(f"  -> {self.remedy}")
        return "\n".join(lines)


class LeptonError(Exception):
    """Base of every error that lepton-fed raises on purpose.

    Args:
        problems: One problem or several that were found together.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.problems: tuple[Problem, ...] = found
        super().__init__("\n".join(f"[{p.code}] {p}" for p in found))

    @property
    def code(self) -> str:
        """Return the code of the first problem."""
        return self.problems[0].code


class ConfError(LeptonError):
    """The conf or the command line is wrong; nothing was started."""

    exit_code = 2


class TaskError(LeptonError):
    """The task cannot be trained as it is written; nothing was started."""

    exit_code = 2


class DataError(LeptonError):
    """Data at a site does not fit the task's contract, or cannot be read."""

    exit_code = 3


class Refused(LeptonError):
    """A protection said no; nothing was released."""

    exit_code = 4


class BudgetExceeded(Refused):
    """The next step would spend more privacy than the data owner allows."""


class BundleRefused(Refused):
    """A bundle is unsigned, changed, or signed by another key."""


class UpdateRefused(Refused):
    """A site's reply is not one that may be added to the sum."""


class RunError(LeptonError):
    """A run could not go on."""

    exit_code = 5


class MissingExtra(LeptonError):
    """A feature needs a package that is not installed."""

    exit_code = 6

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            Problem(
                code="LF6001",
                what=f"this needs {package}, which is not installed",
                remedy=f"pip install 'lepton-fed[{extra}]'",
            )
        )


def capped(problems: Sequence[Problem], closing_code: str) -> list[Problem]:
    """Return at most 20 problems, the last of which counts those left out.

    Args:
        problems: All that were found.
        closing_code: Code of the closing problem.
    """
    if len(problems) <= _SHOWN_PROBLEMS:
        return list(problems)
    kept = list(problems[: _SHOWN_PROBLEMS - 1])
    return [*kept, Problem(closing_code, f"and {len(problems) - len(kept)} more")]


def quoted(value: object) -> str:
    r"""Return ``value`` for an error text: in quotes, at most 40 characters, printable ones only.

    A file is not trusted to talk to a terminal, so control characters are written out.

    Example:
        >>> quoted("a\x1b[31m")
        '"a\\x1b[31m"'
    """
    text = str(value)
    shown = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in text[:_SHOWN_CHARACTERS]
    )
    return f'"{shown}{"..." if len(text) > _SHOWN_CHARACTERS else ""}"'

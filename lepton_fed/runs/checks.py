"""Checks before a run: each says what it found, and one that fails does not hide the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from lepton_fed.errors import LeptonError, Problem

__all__ = ["Check", "Checklist"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What was looked at.
        detail: What was found, when all is well.
        problems: What is wrong; empty when all is well.
    """

    name: str
    detail: str = ""
    problems: tuple[Problem, ...] = ()


class Checklist:
    """Runs checks one after another and keeps what each found."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.exit_code = 0

    def add(
        self, name: str, look: Callable[[], Found], say: Callable[[Found], str], remedy: str = ""
    ) -> Found | None:
        """Look at one thing.

        Args:
            name: What is looked at.
            look: Looks; raises a LeptonError when something is wrong.
            say: From what was found to a line of text.
            remedy: What to do about a problem that does not say it itself.

        Returns:
            What was found; None when something is wrong.
        """
        try:
            found = look()
        except LeptonError as error:
            self.exit_code = self.exit_code or error.exit_code
            problems = tuple(replace(p, remedy=p.remedy or remedy) for p in error.problems)
            self.checks.append(Check(name, problems=problems))
            return None
        self.checks.append(Check(name, say(found)))
        return found

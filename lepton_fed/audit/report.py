"""What an audit found: a verdict on each check, as plain data beside the run's record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import plain
from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.files import reading, write_atomic

__all__ = ["Attack", "Attacks", "AuditReport", "Check", "read_report", "write_report"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: noise, contribution, bound, or accounting.
        passed: Whether it is as it should be.
        found: What was found, in a sentence with its numbers.
        numbers: The same as numbers, by name.
    """

    name: str
    passed: bool
    found: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Attack:
    """One thing that was tried.

    Args:
        name: membership, or inversion.
        passed: Whether a claim that bounds it holds; None where none does, or it was not done.
        found: What was found, in a sentence with its numbers.
        numbers: The same as numbers, by name; none where it was not done.
    """

    name: str
    passed: bool | None
    found: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Attacks:
    """What can be told of records from what the coordinator receives in a round.

    Args:
        attacks: The attacks.
        received: What the coordinator receives, in words.
        rows: Whose rows were attacked, in words.
        records: How many.
        shadows: Models that were trained to tell members; each was attacked.
        seconds: How long it took.
    """

    attacks: list[Attack]
    received: str
    rows: str
    records: int
    shadows: int
    seconds: float


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        run: Name of the run.
        passed: Whether every check passed, and no attack refuted a claim.
        checks: The checks; none of a run that claims no epsilon, of which only attacks are tried.
        epsilon: Epsilon the audited training claims; None, as what follows, without checks.
        lower_bound: Epsilon is at least this, with the confidence in ``confidence``.
        confidence: Probability with which the lower bound is true.
        delta: Delta of both.
        adjacency: Which data sets are neighbours.
        sampler: The sampler that was audited.
        steps: Steps of the audited training.
        canaries: Canaries in it.
        time: When, UTC, ISO 8601.
        seconds: How long the checks took.
        version: lepton-fed's.
        attacks: What was attacked; None where nothing was.
    """

    run: str
    passed: bool
    checks: list[Check]
    epsilon: float | None
    lower_bound: float | None
    confidence: float | None
    delta: float | None
    adjacency: str
    sampler: str
    steps: int
    canaries: int
    time: str
    seconds: float
    version: str
    attacks: Attacks | None = None

    @property
    def failed(self) -> list[Check | Attack]:
        """Return the checks that did not pass, and the attacks that refuted a claim."""
        found: list[Check | Attack] = [*self.checks]
        found += self.attacks.attacks if self.attacks else []
        return [each for each in found if each.passed is False]

    @property
    def verdict(self) -> str:
        """Return the result in a line."""
        when = self.time[:16].replace("T", " ")
        if not self.passed:
            return f"FAILED {when} UTC: {', '.join(found.name for found in self.failed)}"
        if self.epsilon is None or self.lower_bound is None:
            return f"attacked {when} UTC: no epsilon is claimed"
        attacked = ", attacked" if self.attacks else ""
        return (
            f"passed {when} UTC: epsilon between {self.lower_bound:.2f} (proved) and "
            f"{self.epsilon:.2f} (claimed), {self.steps} steps{attacked}"
        )


def write_report(report: AuditReport, path: Path) -> None:
    """Write a report as JSON.

    Raises:
        RunError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(report), indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_report(path: Path) -> AuditReport | None:
    """Return the report in a file; None if there is none.

    Raises:
        RunError: LF5233, it is no report; or it cannot be read.
    """
    with reading(path):
        if not path.exists():
            return None
        content = path.read_bytes()
    try:
        return decode(AuditReport, strict_json(content))
    except ValueError as error:
        raise RunError(
            Problem("LF5233", f"this is no audit's report: {error}", where=str(path),
                    remedy="remove it and audit again")
        ) from error  # fmt: skip

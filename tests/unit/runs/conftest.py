"""Run folders whose log is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder

BEGAN = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
SITES = ("east", "north", "south")


@dataclass
class Written:
    """A run whose events a test writes; each event comes ten seconds after the one before."""

    folder: RunFolder
    log: EventLog | None = None
    seconds: int = 0
    told: list[Any] = field(default_factory=list)

    def clock(self) -> str:
        time = BEGAN + timedelta(seconds=self.seconds)
        self.seconds += 10
        return time.isoformat(timespec="milliseconds")

    def open(self) -> Written:
        self.log = EventLog(self.folder.events, (self.told.append,), self.clock)
        return self

    def close(self) -> Written:
        if self.log is not None:
            self.log.close()
            self.log = None
        return self

    def emit(self, event: str, **fields: Any) -> Written:
        assert self.log is not None
        self.log.emit(event, **fields)
        return self

    def started(self, rounds: int = 5, sites: tuple[str, ...] = SITES) -> Written:
        return self.emit("run.started", rounds=rounds, sites=list(sites))

    def round(self, number: int, cohort: tuple[str, ...] = SITES, **fields: Any) -> Written:
        return self.emit("round.started", round=number, rounds=5, cohort=list(cohort), **fields)

    def accepted(self, number: int, site: str, epsilon: float | None = None) -> Written:
        return self.emit(
            "reply.accepted", round=number, site=site, bytes=1000, norm=0.5, epsilon=epsilon
        )

    def refused(self, number: int, site: str, code: str, why: str = "no") -> Written:
        return self.emit("reply.refused", round=number, site=site, code=code, why=why)

    def closed(self, number: int, sites: tuple[str, ...] = SITES, sent: int = 6000) -> Written:
        return self.emit(
            "round.closed", round=number, rounds=5, sites=list(sites), model="m" * 64,
            digest=f"{number}" * 64, seconds={}, sent_bytes=sent,
        )  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[[], Written]]:
    """Makes a run folder with an open log."""
    made: list[Written] = []

    def make() -> Written:
        made.append(Written(RunFolder.create(tmp_path / "runs", "digits", "kind: x\n")))
        return made[-1].open()

    yield make
    for each in made:
        each.close()

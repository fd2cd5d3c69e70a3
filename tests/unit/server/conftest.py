"""A federation in memory: a linear model, four sites with rows of their own, no transport."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, Rounds, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask, Reply, Update
from lepton_fed.core.layout import Layout, Vector
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.pace import Deadline, Pace
from lepton_fed.core.seeds import generator
from lepton_fed.core.task import Aggregation, Column, DataContract, Target, Task
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.runs.events import Event, EventLog, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.strategies.base import DELTA, Strategy
from lepton_fed.strategies.fedavg import fedavg

SITES = ("a", "b", "c", "d")
FEATURES = 3

Answer = Callable[[Ask], Iterable[Reply]]


@dataclass
class MemoryTransport:
    """Asks functions; ``order`` says in which order their replies come."""

    answers: Mapping[str, Answer]
    order: Callable[[Sequence[str]], Sequence[str]] = list
    asked: list[tuple[tuple[str, ...], Ask]] = field(default_factory=list)

    def sites(self) -> Sequence[str]:
        return list(self.answers)

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        del deadline
        self.asked.append((tuple(asks), next(iter(asks.values()))))
        for site in self.order(list(asks)):
            yield from self.answers[site](asks[site])

    def take_late(self) -> list[Any]:
        return []


@dataclass
class World:
    """Everything a coordinator needs, and honest sites for it."""

    root: Path
    task: Task
    layout: Layout
    plan: MetricsPlan
    folder: RunFolder | None = None
    privacy: Privacy = field(default_factory=Privacy)
    agreement: Agreement | None = None

    @property
    def initial(self) -> Vector:
        return generator(3, "init").normal(size=self.layout.size).astype(np.float32)

    def rows(self, site: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rng = generator(5, "rows", site=site)
        inputs = rng.normal(size=(20 + 7 * (ord(site) - ord("a")), FEATURES))
        return inputs, (inputs.sum(axis=1) + rng.normal(size=len(inputs)) > 0).astype(np.int64)

    def counts(self, site: str, model: Vector) -> np.ndarray[Any, Any]:
        inputs, codes = self.rows(site)
        views = self.layout.views(model)
        return self.plan.measure(inputs @ views["weight"].T + views["bias"], codes)

    def honest(self, site: str) -> Callable[[Ask], list[Reply]]:
        """A site that sends what it should: half-way to a model of its own, and its counts."""

        def answer(ask: Ask) -> list[Reply]:
            received = ask.vectors[MODEL]
            rng = generator(1, "own", round_number=ask.round_number, site=site)
            delta = ((rng.normal(size=received.size) - received) / 2).astype(np.float32)
            return [
                Reply(
                    site,
                    update=Update(self.layout.digest, {DELTA: delta}, self.weight(site))
                    if ask.train
                    else None,
                    counts=self.counts(site, received) if ask.evaluate else None,
                    sent_bytes=delta.nbytes,
                )
            ]

        return answer

    def weight(self, site: str) -> float:
        return 5.0 + 3.0 * (ord(site) - ord("a"))

    def transport(self, **others: Answer) -> MemoryTransport:
        """Four honest sites, some of them replaced by others."""
        return MemoryTransport({site: self.honest(site) for site in SITES} | others)

    def run(
        self,
        transport: MemoryTransport,
        rounds: Rounds | None = None,
        strategy: Strategy | None = None,
        seed: int = 1,
        pace: Pace | None = None,
    ) -> Outcome:
        self.folder = RunFolder.create(self.root, "test", "conf: true\n")
        log = EventLog(self.folder.events)
        try:
            rounds = rounds or Rounds(count=3)
            agreement = Agreement(
                self.folder.name,
                self.task,
                StrategyConf(),
                rounds.count,
                seed,
                self.privacy,
            )
            self.agreement = with_client_noise(agreement, self.layout.size)
            coordinator = Coordinator(
                self.agreement,
                rounds,
                self.layout,
                self.plan,
                strategy or fedavg(),
                folder=self.folder,
                pace=pace,
                log=log,
            )
            return coordinator.run(transport, coordinator.start(self.initial))
        finally:
            log.close()

    def events(self, *names: str) -> list[Event]:
        assert self.folder is not None
        return [e for e in read_events(self.folder.events) if not names or e["event"] in names]


@pytest.fixture
def world(tmp_path: Path) -> World:
    contract = DataContract(
        columns=[Column(f"x{i}") for i in range(FEATURES)], target=Target(classes=["no", "yes"])
    )
    task = Task(
        data=contract,
        metrics=["accuracy", "macro_f1", "auc"],
        aggregation=Aggregation("rows", weight_bound=20.0, norm_bound=100.0),
    )
    layout = Layout.of(
        [
            ("weight", "shared", np.zeros((2, FEATURES), np.float32)),
            ("bias", "shared", np.zeros(2, np.float32)),
        ]
    )
    return World(tmp_path / "runs", task, layout, MetricsPlan.of(task))

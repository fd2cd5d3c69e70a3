"""Sites and a line to them for rounds that are summed by secure aggregation, all in memory.

The sites are real, but for training: each has one update for a round, which no test can mistake for
another's. Every ask is answered by a site that was started for it, from what its vault holds.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lepton_fed.clients.masked import MaskedSite
from lepton_fed.clients.vault import FileVault, MemoryVault, Remembered, Vault
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    AggregationFloor,
    ClientPrivacy,
    Privacy,
    RecordPrivacy,
    SecureAggregation,
    StrategyConf,
)
from lepton_fed.core.exchange import MODEL, Ask, PhaseAsk, PhaseReply, Reply, Update
from lepton_fed.core.norms import clipped
from lepton_fed.core.pace import Deadline
from lepton_fed.core.seeds import generator
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.errors import LeptonError, Problem
from lepton_fed.identity.signature import PrivateKey, PublicKey
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.privacy.dp.shared import noise_to_agree_on
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.privacy.secagg.vector import MaskedLayout, Opened
from lepton_fed.runs.events import Event, EventLog, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.masked import MaskedRounds
from lepton_fed.strategies.base import DELTA

SIZE = 5
COUNTS = 3
SHAPE = Shape("1" * 64, (DELTA,), SIZE, COUNTS)
TASK = Task(aggregation=Aggregation("rows", weight_bound=20.0, norm_bound=100.0))
PHASES = ("advertise", "share", "mask", "confirm", "reveal")

Answer = Callable[[], PhaseReply]
Fault = Callable[[str, PhaseAsk, Answer], Iterable[PhaseReply]]


class CopyingVault(MemoryVault):
    """A vault that shares no object with the site, as a file does not."""

    def recall(self) -> Remembered:
        return copy.deepcopy(super().recall())

    def remember(self, now: Remembered) -> None:
        super().remember(copy.deepcopy(now))


@dataclass
class MaskedWorld:
    """A run, its sites and its coordinator.

    Args:
        root: Where everything is.
        names: Names of the sites.
        secure: What was agreed to.
        on_disk: Whether sites have files for their memory.
        rounds: Rounds of the run.
        quorum: Fewest sites of a round.
        floor: What each site's owner asks.
        task: What is learned.
        record: Record-level DP of the run.
        client: Client-level DP of the run.
    """

    root: Path
    names: Sequence[str] = tuple("abcde")
    secure: SecureAggregation = field(default_factory=lambda: SecureAggregation(enabled=True))
    on_disk: bool = False
    rounds: int = 3
    quorum: int = 1
    floor: AggregationFloor = field(default_factory=AggregationFloor)
    task: Task = TASK
    record: RecordPrivacy = field(default_factory=RecordPrivacy)
    client: ClientPrivacy = field(default_factory=ClientPrivacy)

    def __post_init__(self) -> None:
        self.identities = {name: PrivateKey.generate() for name in self.names}
        self.roster = {name: key.public_key() for name, key in self.identities.items()}
        privacy = Privacy(self.record, secure_aggregation=self.secure, client=self.client)
        noise = noise_to_agree_on(privacy, self.rounds)
        agreement = Agreement(
            "run-1", self.task, StrategyConf(), self.rounds, 7, privacy, len(self.names), noise
        )
        self.agreement = with_client_noise(agreement, SIZE)
        self.folder = RunFolder.create(self.root, "test", "conf: true\n")
        self.pinned: dict[str, Mapping[str, PublicKey]] = {}
        self.vaults: dict[str, Vault] = {}
        self.answered: Counter[tuple[str, int, bool]] = Counter()
        self.now = 0.0

    # --- sites

    def ask(
        self, number: int = 1, *, train: bool = True, evaluate: bool = True, clip: float = 0.0
    ) -> Ask:
        model = np.full(SIZE, number, np.float32)
        ask = Ask(self.agreement.digest, SHAPE.layout, number, train, evaluate, {MODEL: model})
        return replace(ask, clip=clip)

    def vault(self, name: str) -> Vault:
        if self.on_disk:
            return FileVault(self.root / "sites" / name, self.agreement.digest)
        return self.vaults.setdefault(name, CopyingVault())

    def site(self, name: str) -> MaskedSite:
        """Return a site as it is after a restart."""
        return MaskedSite(
            name,
            self.identities[name],
            self.pinned.get(name, self.roster),
            self.agreement,
            SHAPE,
            self.floor,
            self.vault(name),
            lambda ask: self.trained(name, ask),
            clock=lambda: self.now,
        )

    def trained(self, name: str, ask: Ask) -> Reply:
        """Return what a site would send if nothing was masked."""
        self.answered[name, ask.round_number, ask.train] += 1
        return self.update(name, ask)

    def update(self, name: str, ask: Ask) -> Reply:
        draws = generator(1, "own", round_number=ask.round_number, site=name)
        delta = draws.normal(size=SIZE).astype(np.float32)
        weight = float(draws.integers(1, 20))
        if self.task.aggregation.weight == "equal":
            weight = 1.0
        counts = draws.integers(1, 100, COUNTS).astype(np.float64)
        norms = {DELTA: 250.0}
        if ask.clip:  # a real site clips where it trains, and says what the norm was
            delta, norms[DELTA] = clipped(delta, ask.clip)
        update = Update(SHAPE.layout, {DELTA: delta}, weight, norms)
        return Reply(name, update if ask.train else None, counts if ask.evaluate else None)

    def take(self, name: str, asked: PhaseAsk) -> PhaseReply:
        """Return what a site answers, as its agent has it leave."""
        try:
            return self.site(name).take(asked)
        except LeptonError as error:
            return PhaseReply(name, refusal=error.problems[0])

    def pin(self, *names: str) -> None:
        """Have sites go by the roster as it is now, also when the coordinator's changes."""
        self.pinned |= {name: dict(self.roster) for name in names or self.names}

    # --- the coordinator

    def masked(self, log: EventLog) -> MaskedRounds:
        """Return a coordinator that was just started."""
        return MaskedRounds(
            self.agreement, SHAPE, self.folder, log, lambda: self.roster, quorum=self.quorum
        )

    def sums(
        self, line: Line, ask: Ask | None = None, cohort: Sequence[str] | None = None
    ) -> list[GroupSum]:
        """Have the sums of a round made, by a coordinator that was started for it."""
        log = EventLog(self.folder.events)
        try:
            names = self.names if cohort is None else cohort
            return self.masked(log).sums(line, ask or self.ask(), names, None, lambda _: None)
        finally:
            log.close()

    def events(self, *names: str) -> list[Event]:
        return [e for e in read_events(self.folder.events) if not names or e["event"] in names]

    def refusals(self) -> list[tuple[str, str]]:
        """Return which site was refused under which code, in order."""
        return [(event["site"], event["code"]) for event in self.events("reply.refused")]

    # --- what is to come of it

    def layout(self, ask: Ask) -> MaskedLayout:
        return masked_layout(self.agreement, SHAPE, train=ask.train, evaluate=ask.evaluate)

    def encoded(self, name: str, ask: Ask) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return a site's vector before it is masked."""
        reply, layout = self.update(name, ask), self.layout(ask)
        vectors, weight = {}, layout.encoding.weight_bound
        if reply.update is not None:
            vectors, weight = dict(reply.update.vectors), reply.update.weight
        return layout.encode(vectors, weight, reply.counts)[0].astype(np.uint64)

    def expected(self, names: Iterable[str], ask: Ask) -> Opened:
        """Return the sum of some sites, added up in the clear."""
        layout = self.layout(ask)
        total = np.sum([self.encoded(name, ask) for name in names], axis=0, dtype=np.uint64)
        total &= layout.encoding.mask
        return layout.open(total.astype(f"u{4 if layout.encoding.bits <= 32 else 8}"))

    def require_sum(self, group: GroupSum, ask: Ask | None = None) -> None:
        """Assert that a sum is that of the sites which it names, to the last bit."""
        found, wanted = group.opened, self.expected(group.names, ask or self.ask())
        assert found.vectors.keys() == wanted.vectors.keys()
        for name, vector in wanted.vectors.items():
            np.testing.assert_array_equal(found.vectors[name], vector)
        np.testing.assert_array_equal(found.counts, wanted.counts)
        assert (found.weight, found.saturated) == (wanted.weight, wanted.saturated)
        assert found.replies == len(group.names)


@dataclass
class Line:
    """Carries phases to the sites of a world.

    Args:
        world: The world.
        fault: From site, ask and the site's answer to what the coordinator hears.
        order: In which order sites are heard.
    """

    world: MaskedWorld
    fault: Fault | None = None
    order: Callable[[list[str]], list[str]] = list
    asked: list[tuple[str, PhaseAsk]] = field(default_factory=list)
    left: list[tuple[PhaseAsk, PhaseReply]] = field(default_factory=list)
    heard: list[tuple[PhaseAsk, PhaseReply]] = field(default_factory=list)

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        del deadline, answer_bytes
        self.asked += asks.items()
        for name in self.order(list(asks)):
            asked = asks[name]

            def answer(name: str = name, asked: PhaseAsk = asked) -> PhaseReply:
                reply = self.world.take(name, asked)
                self.left.append((asked, reply))
                return replace(reply, notes={}, norms=(0.0, 0.0), words=0)  # these stay

            for reply in self.fault(name, asked, answer) if self.fault else [answer()]:
                self.heard.append((asked, reply))
                yield reply

    def came(self, phase: str, attempt: int | None = None) -> list[str]:
        """Return which sites let an answer to a phase leave, sorted."""
        return sorted(
            {
                reply.site
                for asked, reply in self.left
                if asked.phase == phase and reply.refusal is None
                and attempt in (None, asked.attempt)
            }
        )  # fmt: skip


def failing(where: Mapping[tuple[str, str], Fault]) -> Fault:
    """Return a fault of some sites in some phases, in the first attempt alone."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        one = where.get((name, asked.phase)) if asked.attempt == 1 else None
        return one(name, asked, answer) if one else [answer()]

    return fault


def silent(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
    """The site is gone before it hears anything."""
    del name, asked, answer
    return []


def lost(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
    """The site answers, and nobody hears it."""
    del name, asked
    answer()
    return []


def doubled(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
    """The answer comes twice, and a stranger's beside it."""
    del asked
    one = answer()
    return [one, replace(one, site=f"not-{name}"), one]


def refusing(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
    """The site refuses, for a reason of its own."""
    del asked, answer
    return [PhaseReply(name, refusal=Problem("LF4605", "at other hours"))]


def garbled(body: bytes) -> Fault:
    """The answer is something else altogether."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        del asked
        return [replace(answer(), site=name, body=body, masked=None)]

    return fault

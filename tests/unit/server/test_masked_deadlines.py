"""In a masked round a site that gives no answer is given up at its phase's deadline.

The phases go through the real transport, to apps in this process; time is a number that a nap
moves on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from lepton_fed.core.exchange import PhaseAsk, PhaseReply
from lepton_fed.core.pace import Deadline
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.flower.transport import SITE, GridTransport, client_app
from lepton_fed.runs.events import EventLog
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.masked import MaskedRounds
from tests.unit.server.masked_world import PHASES, SHAPE, MaskedWorld

PATIENCE = 3.0
QUICK_S = 60.0  # three times the least that is expected of anybody
TRAINING = Deadline(PATIENCE, 5, expected_s=100.0)
NEVER = float("inf")


class SlowGrid(InProcessGrid):
    """A grid on which some sites take long in some phases: ``slow[name, phase]`` seconds."""

    def __init__(self, world: MaskedWorld, slow: dict[tuple[str, str], float]) -> None:
        app = client_app(lambda name, ask: world.trained(name, ask), world.take)
        super().__init__(app, [{SITE: name} for name in world.names])
        self.world, self.slow = world, slow
        self.names = dict(zip(self.get_node_ids(), world.names, strict=True))
        self.there: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[str]:
        held = list(messages)
        pushed = super().push_messages(held, answer_bytes)
        for message_id, message in zip(pushed, held, strict=True):
            key = (self.names[message.metadata.dst_node_id], message.content["head"]["phase"])
            self.there[message_id] = self.world.now + self.slow.get(key, 0.0)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            [each for each in message_ids if self.there[each] <= self.world.now]
        )


class Waiting:
    """A coordinator that waits by the clock of its world."""

    def __init__(self, world: MaskedWorld, slow: dict[tuple[str, str], float]) -> None:
        self.world = world
        grid = SlowGrid(world, slow)
        nodes = {name: node for node, name in grid.names.items()}
        self.transport = GridTransport(grid, nodes, sleep=self.nap, clock=lambda: world.now)
        self.told: list[tuple[str, float]] = []

    def nap(self, seconds: float) -> None:
        self.world.now += max(seconds, 1.0)
        assert self.world.now < 10_000, "somebody is waited for without end"

    def sums(self, number: int = 1, deadline: Deadline | None = TRAINING) -> list[GroupSum]:
        world = self.world
        log = EventLog(world.folder.events)
        masked = MaskedRounds(
            world.agreement, SHAPE, world.folder, log, lambda: world.roster, patience=PATIENCE
        )
        try:
            return masked.sums(self.transport, world.ask(number), world.names, deadline,
                               lambda name: self.told.append((name, world.now)))  # fmt: skip
        finally:
            log.close()


@pytest.fixture
def world(tmp_path: Path) -> MaskedWorld:
    return MaskedWorld(tmp_path)


def test_nobody_is_waited_for_who_has_answered(world: MaskedWorld) -> None:
    (group,) = Waiting(world, {}).sums()
    world.require_sum(group)
    assert world.now == 0


@pytest.mark.parametrize("phase", PHASES)
def test_a_mute_site_is_given_up_at_the_deadline_and_the_round_goes_on(
    world: MaskedWorld, phase: str
) -> None:
    (group,) = Waiting(world, {("b", phase): NEVER}).sums()
    # Whose vector had come is in the sum, whatever it does after that.
    left = tuple("abcde") if phase in ("confirm", "reveal") else tuple("acde")
    assert group.names == left
    world.require_sum(group)
    # Who has not confirmed may have, unheard: it is asked for shares, and refuses if it has not.
    unconfirmed = [("b", "LF4514")] if phase == "confirm" else []
    assert world.refusals() == [("b", "LF5306"), *unconfirmed]
    allowed = PATIENCE * 100.0 if phase == "share" else QUICK_S
    assert allowed < world.now < allowed + 3


def test_each_phase_has_a_deadline_of_its_own(world: MaskedWorld) -> None:
    """A site that is slow everywhere, and in time everywhere, is in the sum."""
    slow = {("b", phase): 280.0 if phase == "share" else 50.0 for phase in PHASES}
    (group,) = Waiting(world, slow).sums()
    assert group.names == tuple("abcde")
    world.require_sum(group)
    assert world.refusals() == []
    assert 480 <= world.now < 490


def test_a_large_vector_has_the_time_that_a_slow_line_takes(
    world: MaskedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lepton_fed.server.masked._SLOW_BYTES_PER_S", 1.0)
    waiting = Waiting(world, {("b", "mask"): NEVER})
    (group,) = waiting.sums()
    assert PATIENCE * 2 * group.sent_bytes < world.now < PATIENCE * 2 * group.sent_bytes + 3


@pytest.mark.parametrize("phase", ["share", "mask"])
def test_an_answer_after_the_deadline_is_dropped_and_told(world: MaskedWorld, phase: str) -> None:
    waiting = Waiting(world, {("b", phase): 400.0})
    (group,) = waiting.sums()
    world.require_sum(group)
    assert group.names == tuple("acde")
    world.now += 300
    (next_group,) = waiting.sums(2)
    assert [late.site for late in waiting.transport.take_late()][:1] == ["b"]
    world.require_sum(next_group, world.ask(2))


def test_below_the_threshold_the_round_ends_at_the_deadline(world: MaskedWorld) -> None:
    mute = {(name, "mask"): NEVER for name in "bc"}
    assert Waiting(world, mute).sums() == []
    assert QUICK_S < world.now < QUICK_S + 3
    (event,) = world.events("secagg.abandoned")
    assert (event["phase"], event["why"]) == ("mask", "3 sites are left, the threshold is 4")


def test_a_site_that_trains_too_long_is_told_with_what_it_was_waited_for(
    world: MaskedWorld,
) -> None:
    """The next round expects more, as of updates that are sent as they are."""
    waiting = Waiting(world, {("b", "share"): NEVER, ("c", "mask"): NEVER})
    waiting.sums()
    told: dict[str, Any] = dict(waiting.told)
    assert sorted(told) == list("abcde")
    assert [told[name] for name in "acde"] == [0.0] * 4
    assert told["b"] > 300


def test_without_a_pace_no_deadline_is_handed_on(world: MaskedWorld) -> None:
    seen: list[Deadline | None] = []

    class Noting:
        def phase(
            self, asks: dict[str, PhaseAsk], deadline: Deadline | None = None, size: int = 0
        ) -> Sequence[PhaseReply]:
            del size
            seen.append(deadline)
            return [world.take(name, asked) for name, asked in asks.items()]

    log = EventLog(world.folder.events)
    masked = world.masked(log)
    (group,) = masked.sums(Noting(), world.ask(), world.names, None, lambda _: None)  # type: ignore[arg-type]
    log.close()
    world.require_sum(group)
    assert seen == [None] * 5

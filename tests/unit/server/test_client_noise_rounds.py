"""Rounds with client-level DP: their sums are noised, and none of too few is opened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.schema import ClientPrivacy, Privacy, Rounds, SecureAggregation
from lepton_fed.core.exchange import MODEL, Ask, PhaseAsk, PhaseReply, Reply
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.privacy.client import ClientNoise, client_noise
from lepton_fed.privacy.masked_plan import roster_digest
from lepton_fed.privacy.secagg.requests import (
    AdvertReply,
    AdvertRequest,
    ShareRequest,
    packed_body,
    read_body,
)
from lepton_fed.server.noised import masked_mean
from lepton_fed.strategies.base import DELTA

from .conftest import SITES
from .masked_world import SIZE, Line, MaskedWorld, failing, silent

TASK = Task(aggregation=Aggregation(norm_bound=100.0))
SHARED = ClientPrivacy(enabled=True, epsilon=20.0, clip=1.0, honest=7)
TEN = tuple("abcdefghij")
WORLDS = 10


def world_of(root: Path, names: tuple[str, ...] = tuple("abcde"), **client: Any) -> MaskedWorld:
    secure = SecureAggregation(enabled=True, bits=24)
    return MaskedWorld(root, names, secure, task=TASK, client=replace(SHARED, **client))


def noise_of(world: MaskedWorld) -> ClientNoise:
    noise = client_noise(world.agreement, SIZE)
    assert noise is not None
    return noise


def updates_of(world: MaskedWorld, names: tuple[str, ...]) -> list[np.ndarray[Any, Any]]:
    """Return what sites train, before it is clipped."""
    updates = [world.update(name, world.ask()).update for name in names]
    return [update.vectors[DELTA].astype(np.float64) for update in updates if update]


def clear_mean(
    world: MaskedWorld, names: tuple[str, ...], clip: float = 0.0
) -> np.ndarray[Any, Any]:
    total = np.zeros(SIZE)
    for delta in updates_of(world, names):
        total += delta * min(1.0, (clip or world.client.clip) / float(np.linalg.norm(delta)))
    return total / len(names)


@pytest.mark.parametrize(
    "client",
    [
        {"mechanism": "discrete_gaussian"},
        {"mechanism": "skellam"},
        # Training is made up here, so nothing is clipped before it comes to the coordinator.
        {"noise": "coordinator", "honest": 0, "clip": 100.0},
    ],
)
def test_the_mean_of_ten_sites_is_that_of_their_clipped_updates_and_the_planned_noise(
    tmp_path: Path, client: dict[str, Any]
) -> None:
    errors = []
    for number in range(WORLDS):
        world = world_of(tmp_path / str(number), TEN, **client)
        (group,) = world.sums(Line(world))
        encoding = world.layout(world.ask()).encoding
        mean, _ = masked_mean(noise_of(world), encoding, 1, group)
        assert group.names == TEN
        errors.append(mean - clear_mean(world, group.names))
    wanted = noise_of(world).mean_deviation(len(TEN))
    assert np.std(errors) == pytest.approx(wanted, rel=4 / math.sqrt(2 * WORLDS * SIZE))
    assert abs(np.mean(errors)) < 4 * wanted / math.sqrt(WORLDS * SIZE)


MOVING = {
    "shared": {"quantile": 0.5},
    "skellam": {"quantile": 0.5, "mechanism": "skellam"},
    "coordinator": {"quantile": 0.5, "noise": "coordinator", "honest": 0},
}


@pytest.mark.parametrize("client", MOVING.values(), ids=MOVING)
def test_a_masked_sum_tells_how_many_updates_were_longer_than_the_round_s_norm(
    tmp_path: Path, client: dict[str, Any]
) -> None:
    norm, fractions, errors = 2.0, [], []
    for number in range(WORLDS):
        world = world_of(tmp_path / str(number), TEN, **client, epsilon=50.0)
        ask = world.ask(clip=norm)
        (group,) = world.sums(Line(world), ask)
        assert group.names == TEN
        noise = noise_of(world).in_round(norm)
        mean, following = masked_mean(noise, world.layout(ask).encoding, 1, group)
        assert mean.shape == (SIZE,)
        fractions.append(0.5 - math.log(following / norm) / 0.2)
        errors.append(mean - clear_mean(world, TEN, norm))
        lengths = [float(np.linalg.norm(vector)) for vector in updates_of(world, TEN)]
    within = np.mean(np.array(lengths) <= norm)
    assert 0 < within < 1
    deviation = noise.fraction_deviation(len(TEN))
    assert np.mean(fractions) == pytest.approx(within, abs=4 * deviation / math.sqrt(WORLDS))
    wanted = noise.mean_deviation(len(TEN))
    assert np.std(errors) == pytest.approx(wanted, rel=4 / math.sqrt(2 * WORLDS * SIZE))
    assert abs(np.mean(errors)) < 4 * wanted / math.sqrt(WORLDS * SIZE)


@pytest.mark.parametrize("client", MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("told", [0.0, -1.0, 1e-300, 100.001, math.inf, math.nan])
def test_a_site_does_not_begin_a_round_whose_norm_is_out_of_bounds(
    tmp_path: Path, client: dict[str, Any], told: float
) -> None:
    world = world_of(tmp_path, TEN, **client)
    reply = world.take("a", PhaseAsk("advertise", 1, b"", world.ask(clip=told)))
    assert reply.refusal is not None
    assert reply.refusal.code == "LF4519"
    assert not world.answered


def test_a_norm_is_told_in_no_run_that_agreed_on_one(tmp_path: Path) -> None:
    world = world_of(tmp_path, TEN)
    for ask in (world.ask(clip=1.0), world.ask(3, train=False, clip=1.0)):
        reply = world.take("a", PhaseAsk("advertise", 1, b"", ask))
        assert reply.refusal is not None
        assert reply.refusal.code == "LF4519"


def test_a_round_is_asked_again_with_the_same_norm_or_not_at_all(tmp_path: Path) -> None:
    """The update is stored with its share of the noise: with another norm there would be two."""
    world = world_of(tmp_path, **MOVING["shared"], honest=3)
    line = Line(world, failing({(name, "mask"): silent for name in "abcde"}))
    assert world.sums(line, world.ask(clip=2.0)) == []
    kept = world.vault("c").words().tobytes()
    body = packed_body(AdvertRequest(roster_digest(world.roster)))
    told = {2.0: PhaseReply("c"), 2.5: PhaseReply("c")}
    for attempt, norm in enumerate((2.5, 2.0), 2):
        ask = world.ask(clip=norm)
        replies = [world.take(name, PhaseAsk("advertise", attempt, body, ask)) for name in "abcde"]
        adverts = [read_body(AdvertReply, reply.body).advert for reply in replies]
        request = packed_body(ShareRequest(roster_digest(world.roster), adverts, 4))
        told[norm] = world.take("c", PhaseAsk("share", attempt, request, ask))
    assert told[2.0].refusal is None
    refusal = told[2.5].refusal
    assert refusal is not None
    assert refusal.code == "LF4506"
    assert world.vault("c").words().tobytes() == kept
    assert max(world.answered.values()) == 1


def test_what_leaves_says_the_norm_of_its_round(tmp_path: Path) -> None:
    for kind, client in MOVING.items():
        world = world_of(tmp_path / kind, TEN, **client)
        line = Line(world)
        assert world.sums(line, world.ask(clip=2.5))
        wanted = noise_of(world).in_round(2.5).notes
        for asked, reply in line.left:
            if asked.phase == "mask":
                assert wanted.items() <= reply.notes.items()
                assert reply.notes["clip"] == "2.5"
                assert reply.norms[1] == min(reply.norms[0], 2.5)


def test_a_round_that_is_asked_again_has_the_same_share_in_it(tmp_path: Path) -> None:
    """Two shares on one update would tell more of it than one."""
    world = world_of(tmp_path, honest=3)
    before: dict[str, bytes] = {}

    def drops(name, asked, answer):  # type: ignore[no-untyped-def]
        reply = answer()
        before[name] = world.vault(name).words().tobytes()
        return [] if name in "ab" else [reply]

    world.sums(Line(world, failing({(name, "mask"): drops for name in "abcde"})))
    kept = [name for name in "abcde" if world.vault(name).stored() is not None]
    assert kept
    assert len(before) == 5
    for name in kept:
        assert world.vault(name).words().tobytes() == before[name]
    assert max(world.answered.values()) == 1


def test_what_leaves_a_site_says_what_covers_it(tmp_path: Path) -> None:
    world = world_of(tmp_path, honest=5)
    line = Line(world)
    assert world.sums(line)
    told = [reply.notes for asked, reply in line.left if asked.phase == "mask"]
    assert [notes["client-level DP"] for notes in told] == [noise_of(world).terms] * 5
    assert {notes["clip"] for notes in told} == {"1"}


def test_an_agreement_with_too_little_noise_is_answered_by_no_site(tmp_path: Path) -> None:
    world = world_of(tmp_path, honest=5)
    world.agreement = replace(world.agreement, client_noise=0.5 * world.agreement.client_noise)
    asked = PhaseAsk("advertise", 1, b"", world.ask())
    reply = world.take("a", asked)
    assert reply.refusal is not None
    assert reply.refusal.code == "LF4630"


def test_the_last_evaluation_has_counts_and_no_noise(tmp_path: Path) -> None:
    world = world_of(tmp_path, honest=5)
    ask = world.ask(3, train=False)
    (group,) = world.sums(Line(world), ask)
    world.require_sum(group, ask)


def test_a_trusted_coordinator_clips_and_noises_the_plain_sum(world: Any) -> None:
    """Twelve runs of one round: their models differ by noises alone, of the planned size."""
    world.task = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    client = ClientPrivacy(enabled=True, epsilon=20.0, clip=0.2, noise="coordinator")
    world.privacy = Privacy(client=client)
    world.weight = lambda site: 1.0
    clear = np.zeros(world.layout.size)
    for site in SITES:
        ask = Ask("", "", 1, True, False, {MODEL: world.initial})
        (reply,) = world.honest(site)(ask)
        delta = reply.update.vectors[DELTA].astype(np.float64)
        norm = float(np.linalg.norm(delta))
        assert norm > client.clip
        clear += delta * client.clip / norm / len(SITES)
    errors = []
    for _ in range(12):
        outcome = world.run(world.transport(), Rounds(count=1, evaluate=False))
        errors.append(outcome.model - world.initial - clear)
    noise = client_noise(world.agreement, world.layout.size)
    assert noise is not None
    wanted = noise.mean_deviation(len(SITES))
    assert wanted == pytest.approx(noise.noise_multiplier * client.clip / len(SITES))
    assert np.std(errors) == pytest.approx(wanted, rel=4 / math.sqrt(2 * np.size(errors)))
    accepted = world.events("reply.accepted")
    assert len(accepted) == len(SITES)
    assert {event["norm"] for event in accepted} == {None}, "no norm of one site is covered"


def norms_of(world: Any, model: np.ndarray[Any, Any]) -> list[float]:
    ask = Ask("", "", 1, True, False, {MODEL: model})
    replies = [world.honest(site)(ask)[0] for site in SITES]
    return [float(np.linalg.norm(reply.update.vectors[DELTA])) for reply in replies]


@pytest.mark.parametrize(("start", "within"), [(0.05, 0.0), (90.0, 1.0)])
def test_a_trusted_coordinator_counts_the_plain_updates_and_moves_the_norm(
    world: Any, start: float, within: float
) -> None:
    world.task = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    client = ClientPrivacy(
        enabled=True, epsilon=100.0, clip=start, quantile=0.5, noise="coordinator"
    )
    world.privacy = Privacy(client=client)
    world.weight = lambda site: 1.0
    assert (np.array(norms_of(world, world.initial)) <= start).mean() == within
    factors = []
    for _ in range(40):
        transport = world.transport()
        world.run(transport, Rounds(count=2, evaluate=False))
        told = [ask.clip for _, ask in transport.asked]
        closed = [event["clip"] for event in world.events("round.closed")]
        assert told == [start, closed[0]], "the next round is asked for the norm that was told"
        factors.append(math.log(told[1] / told[0]))
    noise = client_noise(world.agreement, world.layout.size)
    assert noise is not None
    wanted, deviation = -0.2 * (within - 0.5), 0.2 * noise.fraction_deviation(len(SITES))
    assert np.mean(factors) == pytest.approx(wanted, abs=4 * deviation / math.sqrt(40))
    assert np.std(factors) == pytest.approx(deviation, rel=4 / math.sqrt(80))


def test_below_the_quorum_nothing_is_told_and_the_norm_stays(world: Any) -> None:
    world.task = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    client = ClientPrivacy(enabled=True, clip=2.0, quantile=0.5, noise="coordinator")
    world.privacy = Privacy(client=client)
    world.weight = lambda site: 1.0

    def gone(ask: Ask) -> list[Reply]:
        return [] if ask.round_number == 1 else world.honest("a")(ask)

    transport = world.transport(a=gone)
    world.run(transport, Rounds(count=2, quorum=4, evaluate=False))
    closed = [event["clip"] for event in world.events("round.closed")]
    assert closed[0] == 2.0
    assert closed[1] != 2.0
    assert [ask.clip for _, ask in transport.asked] == [2.0, 2.0]


def test_a_run_without_a_quantile_tells_no_norm(world: Any) -> None:
    transport = world.transport()
    world.run(transport, Rounds(count=1))
    assert {ask.clip for _, ask in transport.asked} == {0.0}
    assert [event["clip"] for event in world.events("round.closed")] == [None]


def test_a_refused_update_is_not_in_the_noised_sum(world: Any) -> None:
    world.task = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    client = ClientPrivacy(enabled=True, epsilon=50.0, clip=1e-6, noise="coordinator")
    world.privacy = Privacy(client=client)
    world.weight = lambda site: 1.0

    def endless(ask: Ask) -> list[Reply]:
        (reply,) = world.honest("b")(ask)
        vector = np.full(world.layout.size, np.inf, np.float32)
        return [replace(reply, site="b", update=replace(reply.update, vectors={DELTA: vector}))]

    outcome = world.run(world.transport(b=endless), Rounds(count=1, evaluate=False))
    assert np.abs(outcome.model - world.initial).max() < 1e-4
    assert [event["site"] for event in world.events("reply.refused")] == ["b"]
    (closed,) = world.events("round.closed")
    assert closed["sites"] == ["a", "c", "d"]

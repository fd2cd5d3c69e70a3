"""A coordinator that tells sites different norms, to have a sum with less noise than was paid for.

Each site adds noise in proportion to the norm that it clips to, and counts on that of the others.
Told a tiny norm, the others would send next to no noise: their share would be worth nothing to the
one that was told a large one. Two things are in the way, and each is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lepton_fed.clients import masked as site_half
from lepton_fed.config.schema import ClientPrivacy, SecureAggregation
from lepton_fed.core.exchange import PhaseAsk, PhaseReply, ask_digest
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.privacy.client import ClientNoise, client_noise
from lepton_fed.server import masked as coordinator_half
from lepton_fed.server.groups import GroupSum
from lepton_fed.strategies.base import DELTA
from tests.unit.server.masked_world import SIZE, Answer, Line, MaskedWorld

VICTIM, OTHERS = "a", "bcdefghij"
LARGE, TINY = 50.0, 2.0**-59
WORLDS = 12
CLIENT = ClientPrivacy(enabled=True, epsilon=20.0, clip=1.0, quantile=0.5, honest=7)


def world_of(root: Path) -> MaskedWorld:
    return MaskedWorld(
        root,
        (VICTIM, *OTHERS),
        SecureAggregation(enabled=True, bits=24),
        task=Task(aggregation=Aggregation(norm_bound=100.0)),
        client=CLIENT,
    )


def noise_of(world: MaskedWorld) -> ClientNoise:
    noise = client_noise(world.agreement, SIZE)
    assert noise is not None
    return noise


def lying(world: MaskedWorld) -> Line:
    """Return a line that tells the victim a large norm, and all others a tiny one."""

    def fault(name: str, asked: PhaseAsk, answer: Answer) -> Iterable[PhaseReply]:
        del answer
        told = LARGE if name == VICTIM else TINY
        return [world.take(name, replace(asked, ask=replace(asked.ask, clip=told)))]

    return Line(world, fault)


def opened(world: MaskedWorld) -> list[GroupSum]:
    return world.sums(lying(world), world.ask(clip=LARGE))


def test_sites_that_were_told_different_norms_are_masked_with_nobody(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    assert opened(world) == []
    told = {name for name, code in world.refusals() if code in ("LF4514", "LF4415")}
    assert told, "they say why"
    for name in world.names:
        assert not world.site(name)._vault.recall().member.closed, "nobody revealed anything"


def test_the_attack_is_real_for_sites_that_do_not_look_at_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the norm in what all of them sign, the very same sum is opened."""
    forgetful(monkeypatch)
    (group,) = opened(world_of(tmp_path))
    assert group.names == (VICTIM, *OTHERS)


def test_even_so_the_noise_on_the_victim_s_update_is_what_was_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share is in steps of a grid that is as fine as the norm is small: all norms add alike."""
    forgetful(monkeypatch)
    errors = []
    for number in range(WORLDS):
        world = world_of(tmp_path / str(number))
        (group,) = opened(world)
        ends = noise_of(world).in_round(LARGE).noisy_sum(1)
        found = ends.from_ring(group.opened.vectors[DELTA].astype(np.uint64))
        errors.append(found - sum(in_steps(world, name) for name in world.names))
    plan = noise_of(world).in_round(LARGE).shares
    assert plan is not None
    deviation = float(np.std(errors)) * plan.grid
    all_shares = plan.noise_multiplier * plan.clip * math.sqrt(len(world.names) / plan.honest)
    assert deviation == pytest.approx(all_shares, rel=4 / math.sqrt(2 * np.size(errors)))


def in_steps(world: MaskedWorld, name: str) -> npt.NDArray[np.float64]:
    """Return what a site adds to the sum before rounding and noise, in steps of its own grid."""
    told = LARGE if name == VICTIM else TINY
    noise = noise_of(world).in_round(told)
    update = world.update(name, world.ask(clip=told)).update
    assert update is not None
    assert noise.shares is not None
    vector = noise.vector(update.vectors[DELTA], over=update.norms[DELTA] > told)
    return noise.noisy_sum(1).rotation.apply(vector) / noise.shares.grid


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the coordinator and all sites leave the norm out of what they sign."""

    def digest(ask):  # type: ignore[no-untyped-def]
        return ask_digest(replace(ask, clip=0.0))

    monkeypatch.setattr(site_half, "ask_digest", digest)
    monkeypatch.setattr(coordinator_half, "ask_digest", digest)

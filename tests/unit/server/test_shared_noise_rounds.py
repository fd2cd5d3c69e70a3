"""Rounds in which sites share one noise: it is in every sum, and no sum of too few is opened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.core.task import Aggregation, Task, TrainingSpec
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.runs.folder import RunFolder
from lepton_fed.strategies.base import DELTA

from .masked_world import SIZE, Line, MaskedWorld, failing

TASK = Task(
    training=TrainingSpec(epochs=None, steps=1, batch_size=4),
    aggregation=Aggregation(norm_bound=100.0),
)


def world_of(root: Path, honest: int) -> MaskedWorld:
    record = RecordPrivacy(
        enabled=True, noise="shared", sampling_rate=0.5, honest=honest, epsilon=1.0
    )
    return MaskedWorld(root, task=TASK, record=record)


def test_every_sum_has_its_own_noise(tmp_path: Path) -> None:
    found = []
    for number in range(40):
        world = world_of(tmp_path / str(number), honest=5)
        (group,) = world.sums(Line(world))
        encoding = world.layout(world.ask()).encoding
        mask = int(encoding.mask)
        clear = world.expected(group.names, world.ask()).vectors[DELTA]
        apart = (group.opened.vectors[DELTA].astype(np.int64) - clear.astype(np.int64)) & mask
        found.append(np.where(apart > mask // 2, apart - mask - 1, apart) * encoding.grid)
    noise = shared_noise(world.agreement, SIZE)
    assert noise is not None
    wanted = noise.noise_multiplier * noise.moves
    assert np.std(found) == pytest.approx(wanted, rel=4 / math.sqrt(2 * 40 * SIZE))


def test_an_attempt_that_is_made_again_has_the_same_noise_in_each_site(tmp_path: Path) -> None:
    """What a site noised once leaves again as it was: two noises of one gradient tell more."""
    world = world_of(tmp_path, honest=3)
    before: dict[str, bytes] = {}

    def drops(name, asked, answer):  # type: ignore[no-untyped-def]
        reply = answer()
        before[name] = world.vault(name).words().tobytes()
        return [] if name in "ab" else [reply]

    line = Line(world, failing({(name, "mask"): drops for name in "abcde"}))
    groups = world.sums(line)
    for name in "abcde":
        if world.vault(name).stored() is not None:
            assert world.vault(name).words().tobytes() == before[name]
    assert all(len(group.names) >= 3 for group in groups)


def test_one_gradient_never_gets_a_second_share(tmp_path: Path) -> None:
    """What a site remembers is lost, or put back from an older copy; its stored answer is not."""
    world = world_of(tmp_path, honest=3)
    honest = world.update

    def stored(name: str, ask: Ask) -> Reply:
        return replace(honest(name, ask), again=world.answered[name, ask.round_number, True] > 1)

    world.update = stored  # type: ignore[method-assign]
    (_,) = world.sums(Line(world))
    world.vaults.clear()
    world.folder = RunFolder.create(tmp_path / "anew", "test", "conf: true\n")
    assert world.sums(Line(world)) == []
    assert {code for _, code in world.refusals()} == {"LF4517"}

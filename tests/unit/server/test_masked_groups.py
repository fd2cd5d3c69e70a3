"""Sums of groups: each by itself, compared by a robust strategy or added up to the sum of all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.schema import SecureAggregation
from lepton_fed.core.layout import Layout, Vector
from lepton_fed.runs import files
from lepton_fed.server.intake import MaskedIntake
from lepton_fed.strategies.base import (
    DELTA,
    Each,
    Needs,
    PlainSite,
    ServerState,
    Stateless,
    Strategy,
    Sum,
)
from lepton_fed.strategies.fedavg import fedavg
from tests.unit.server.masked_world import (
    SIZE,
    Line,
    MaskedWorld,
    failing,
    silent,
)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing: what is on disk, and when, is tried where a process is killed."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


def grouped(tmp_path: Path, sites: int = 24, groups: int = 3) -> MaskedWorld:
    names = [f"site-{number:02}" for number in range(sites)]
    return MaskedWorld(tmp_path, names, SecureAggregation(enabled=True, groups=groups))


def intake(world: MaskedWorld, strategy: Strategy, sums: list[Any]) -> MaskedIntake:
    layout = Layout.of([("weight", "shared", np.zeros(SIZE, np.float32))])
    encoding = world.layout(world.ask()).encoding
    spill = world.folder.spill
    return MaskedIntake(strategy, layout, encoding, 1, len(world.names), spill, sums)


class Robust(Stateless):
    """A server rule that compares single updates: the median of each coordinate."""

    needs: Needs = "each"

    def step(
        self, state: ServerState, model: Vector, aggregate: Sum | Each
    ) -> tuple[ServerState, Vector]:
        assert not isinstance(aggregate, Sum)
        names, whole = aggregate.contributors, slice(0, model.size)
        rows = [aggregate.read(name, DELTA, whole) for name in names]
        return state, model + np.median(rows, axis=0).astype(np.float32)


def weight_of(world: MaskedWorld, name: str) -> float:
    update = world.update(name, world.ask()).update
    assert update is not None
    return update.weight


def mean_of(world: MaskedWorld, names: Iterable[str]) -> np.ndarray[Any, Any]:
    weights, rows = [], []
    for name in names:
        update = world.update(name, world.ask()).update
        assert update is not None
        weights.append(update.weight)
        rows.append(update.vectors[DELTA].astype(np.float64))
    return np.average(rows, axis=0, weights=weights)


def test_a_robust_strategy_gets_the_mean_of_each_group(tmp_path: Path) -> None:
    world = grouped(tmp_path)
    sums = world.sums(Line(world))
    assert [group.number for group in sums] == [1, 2, 3]
    assert [len(group.names) for group in sums] == [8, 8, 8]
    assert sorted(name for group in sums for name in group.names) == world.names
    assert list(sums[0].names) != list(world.names[::3]), "who is with whom is drawn"
    for group in sums:
        world.require_sum(group)
    robust = Strategy("median", PlainSite(), Robust())
    taken = intake(world, robust, sums)
    assert taken.contributors == tuple(world.names)
    each = taken.aggregate()
    assert not isinstance(each, Sum)
    assert each.contributors == ("group-0001", "group-0002", "group-0003")
    for name, group in zip(each.contributors, sums, strict=True):
        found = each.read(name, DELTA, slice(1, 4))
        np.testing.assert_allclose(found, mean_of(world, group.names)[1:4], rtol=0, atol=1e-5)
        wanted = sum(weight_of(world, site) for site in group.names)
        assert each.weight(name) == pytest.approx(wanted)
    _, model = robust.server.step({}, np.zeros(SIZE, np.float32), each)
    median = np.median([mean_of(world, group.names) for group in sums], axis=0)
    np.testing.assert_allclose(model, median, rtol=0, atol=1e-5)
    taken.close()
    assert not world.folder.spill.exists()


def test_the_sum_over_groups_is_that_of_all(tmp_path: Path) -> None:
    world, alone = grouped(tmp_path / "groups"), grouped(tmp_path / "alone", groups=1)
    found = []
    for each in (world, alone):
        taken = intake(each, fedavg(), each.sums(Line(each)))
        total = taken.aggregate()
        assert isinstance(total, Sum)
        found.append((total.mean[DELTA].tobytes(), total.weight, total.contributors))
        taken.close()
    assert found[0] == found[1]
    mean = np.frombuffer(found[0][0])
    np.testing.assert_allclose(mean, mean_of(world, world.names), rtol=0, atol=1e-5)


def test_one_group_that_fails_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    look = grouped(tmp_path / "look")
    first = look.sums(Line(look))[0].names
    world = grouped(tmp_path / "failing")
    line = Line(world, failing({(name, "mask"): silent for name in first[:3]}))
    sums = world.sums(line)
    assert [group.number for group in sums] == [2, 3]
    assert not set(line.came("reveal")) & set(first)
    for group in sums:
        world.require_sum(group)


def test_with_too_few_sites_there_are_no_groups_neither_smaller_nor_fewer(tmp_path: Path) -> None:
    """Of fewer groups a robust strategy would make less than it promises."""
    world = grouped(tmp_path)
    line = Line(world)
    assert world.sums(line, cohort=world.names[:23]) == []
    assert line.came("advertise") == []
    (told,) = world.events("secagg.abandoned")
    assert told["why"] == "23 sites are there, 24 are needed"

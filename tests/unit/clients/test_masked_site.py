"""What a site masks: its update as agreed, or nothing; no one's mistake spoils the sum of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lepton_fed.core.exchange import PhaseAsk, Reply
from lepton_fed.errors import LeptonError, Problem
from lepton_fed.runs import files
from lepton_fed.strategies.base import DELTA
from tests.unit.server.masked_world import COUNTS, SHAPE, SIZE, Line, MaskedWorld


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Sync nothing: that is tried in test_vault.py."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


@pytest.fixture
def world(tmp_path):
    return MaskedWorld(tmp_path, tuple("abcd"), on_disk=True)


def with_update(world, changed):
    """Have site b answer what it is given instead of its own."""
    honest = world.update

    def update(name, ask):
        return changed(honest(name, ask)) if name == "b" else honest(name, ask)

    world.update = update
    return honest


def delta_of(values, weight=1.0):
    return lambda reply: replace(
        reply, update=replace(reply.update, vectors={DELTA: values}, weight=weight)
    )


GOOD = np.ones(SIZE, np.float32)


@pytest.mark.parametrize(
    "changed",
    [
        delta_of(np.array([np.nan, 0, 0, 0, 0], np.float32)),
        delta_of(np.ones(SIZE + 1, np.float32)),
        delta_of(GOOD, weight=0.0),
        delta_of(GOOD, weight=20.5),
        delta_of(GOOD, weight=np.nan),
        delta_of(GOOD, weight=1e-30),
        lambda reply: replace(reply, update=None),
        lambda reply: replace(reply, counts=np.ones(COUNTS + 1)),
    ],
)
def test_what_cannot_be_masked_stays_at_the_site_and_the_others_have_their_sum(world, changed):
    honest = with_update(world, changed)
    line = Line(world)
    (group,) = world.sums(line)
    assert world.refusals() == [("b", "LF5312")]
    assert group.names == tuple("acd")
    world.update = honest
    world.require_sum(group)
    assert "b" not in line.came("share")


def test_coordinates_beyond_the_bound_are_cut_off_and_counted(world):
    with_update(world, delta_of(np.array([1e6, -np.inf, 0, 99, 0], np.float32)))
    (group,) = world.sums(Line(world))
    assert group.opened.saturated == 2
    world.require_sum(group)
    (event,) = world.events("secagg.opened")
    assert (event["saturated"], event["sites"], event["dropped"]) == (2, list("abcd"), [])


@pytest.mark.parametrize("counts", [None, np.array([1, np.nan, 2]), np.array([np.inf, 1, 1])])
def test_counts_that_are_none_cost_neither_the_update_nor_those_of_the_others(world, counts):
    """A model that diverged has an endless loss; the round goes on as it does unmasked."""
    honest = with_update(world, lambda reply: replace(reply, counts=counts))
    (group,) = world.sums(Line(world))
    assert group.names == tuple("abcd")
    wanted = np.sum([honest(name, world.ask()).counts for name in "acd"], axis=0)
    np.testing.assert_array_equal(group.opened.counts, wanted)
    world.update = lambda name, ask: replace(
        honest(name, ask), counts=np.zeros(COUNTS) if name == "b" else honest(name, ask).counts
    )
    world.require_sum(group)


def test_a_refusal_of_training_masks_nothing_and_the_round_may_be_asked_for_again(world):
    honest = world.update
    refusal = Problem("LF4605", "this site trains at other hours")
    world.update = lambda name, ask: Reply(name, refusal=refusal)
    assert world.sums(Line(world)) == []
    assert {code for _, code in world.refusals()} == {"LF4605"}
    world.update = honest
    (group,) = world.sums(Line(world))
    world.require_sum(group)


def test_a_last_evaluation_has_counts_and_no_update(world):
    ask = world.ask(3, train=False)
    (group,) = world.sums(Line(world), ask)
    assert group.opened.vectors == {}
    world.require_sum(group, ask)
    assert SHAPE.vectors == (DELTA,)


def test_an_unknown_phase_is_refused_before_anything_is_read(world):
    with pytest.raises(LeptonError, match="LF4514"):
        world.site("a").take(PhaseAsk("unmask", 1, b"", world.ask()))  # type: ignore[arg-type]
    assert not (world.root / "sites").exists()

"""Where sites share a noise, of a record or of a whole site, no sum of too few is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import test_client_noise_rounds, test_shared_noise_rounds
from .masked_world import Line, MaskedWorld, failing, lost, silent

Build = Callable[..., MaskedWorld]
WORLDS = [test_client_noise_rounds.world_of, test_shared_noise_rounds.world_of]


@pytest.mark.parametrize("phase", ["share", "mask"])
@pytest.mark.parametrize("how", [silent, lost])
@pytest.mark.parametrize("world_of", WORLDS)
def test_no_sum_of_fewer_than_are_counted_on_is_opened(
    tmp_path: Path, world_of: Build, phase: str, how: Any
) -> None:
    world = world_of(tmp_path, honest=5)
    line = Line(world, failing({("b", phase): how}))
    assert world.sums(line) == []
    assert not line.came("reveal")
    (why,) = {event["why"] for event in world.events("secagg.abandoned")}
    assert "4 sites are left" in why


@pytest.mark.parametrize("world_of", WORLDS)
def test_a_site_itself_refuses_a_sum_of_fewer(tmp_path: Path, world_of: Build) -> None:
    """The coordinator goes on with four, as one that lies would."""
    world = world_of(tmp_path, honest=5)
    masked = world.masked

    def careless(log):  # type: ignore[no-untyped-def]
        rounds = masked(log)
        rounds._least = 3
        return rounds

    world.masked = careless  # type: ignore[method-assign]
    line = Line(world, failing({("b", "mask"): silent}))
    assert world.sums(line) == []
    assert not line.came("confirm")
    assert not line.came("reveal")
    assert {code for _, code in world.refusals()} == {"LF4514"}

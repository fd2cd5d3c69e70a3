"""A cohort of more than 200 sites, in which each holds shares of some others only."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_fed.privacy.secagg.graph import COMPLETE, Graph
from lepton_fed.privacy.secagg.messages import Envelope
from lepton_fed.runs import files
from lepton_fed.server.groups import GroupFiles
from tests.unit.server.masked_world import Fault, Line, MaskedWorld, failing, lost, silent

SITES = 210
NAMES = [f"site-{number:03}" for number in range(SITES)]
GONE = {
    **dict.fromkeys([(name, "share") for name in NAMES[3:50:20]], silent),
    **dict.fromkeys([(name, "mask") for name in NAMES[60:100:10]], silent),
    **dict.fromkeys([(name, "mask") for name in NAMES[101:103]], lost),
    **dict.fromkeys([(name, "confirm") for name in NAMES[110:130:10]], silent),
}
"""Who drops out, and before which phase: each a part of a tenth of the cohort."""


@pytest.mark.slow
def test_the_sum_of_a_large_cohort_is_exact_with_drop_outs_and_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda _: None)
    world = MaskedWorld(tmp_path, NAMES)
    dropped = {name for name, phase in GONE if phase in ("share", "mask")}
    deaf: dict[tuple[str, str], Fault] = dict.fromkeys([(n, "reveal") for n in NAMES], lost)
    assert world.sums(Line(world, failing({**GONE, **deaf}))) == []
    (saved,) = GroupFiles(world.folder.masked).load(1)
    graph = Graph.of(SITES, saved.progress.threshold)
    assert SITES > COMPLETE
    assert not graph.is_complete
    assert len(saved.envelopes) == SITES - 3
    assert {len(made) for made in saved.envelopes.values()} == {graph.degree + 1}
    assert saved.progress.survivors == [name for name in NAMES if name not in dropped]

    def verified(*_: object) -> None:
        raise AssertionError("a signature was verified that this coordinator had verified before")

    with monkeypatch.context() as patched:
        patched.setattr(Envelope, "check", verified)
        (group,) = world.sums(Line(world))
    assert group.names == tuple(saved.progress.survivors)
    world.require_sum(group)
    assert set(world.answered.values()) == {1}
    (event,) = world.events("secagg.opened")
    assert len(event["dropped"]) == 6

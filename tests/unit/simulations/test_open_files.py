"""A simulation with more ledgers than the usual limit of open files."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack

import pytest

from lepton_fed.errors import ConfError
from lepton_fed.simulations.open_files import room_for_ledgers
from lepton_fed.simulations.sequential import simulate

LIMIT = resource.RLIMIT_NOFILE


@pytest.fixture
def limits(monkeypatch):
    """Pretend limits; what was set is kept, what the process may do stays as it is."""
    held = {"now": (256, 4096), "set": []}

    def set_limit(which, wanted):
        assert which == LIMIT
        held["now"] = wanted
        held["set"].append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda which: held["now"])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    return held


def test_few_sites_change_no_limit(limits):
    with room_for_ledgers(3):
        assert limits["set"] == []
    assert limits["set"] == []


def test_many_sites_raise_the_soft_limit_for_a_while(limits):
    with room_for_ledgers(1000):
        soft, hard = limits["now"]
        assert 1000 < soft < 1500
        assert hard == 4096
    assert limits["now"] == (256, 4096)


def test_the_limit_is_put_back_after_a_run_that_failed(limits):
    with pytest.raises(KeyError), room_for_ledgers(1000):
        raise KeyError
    assert limits["set"][-1] == limits["now"] == (256, 4096)


def test_no_hard_limit_is_none(limits):
    limits["now"] = (256, resource.RLIM_INFINITY)
    with room_for_ledgers(100_000):
        assert limits["now"][0] > 100_000
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with room_for_ledgers(100_000):
        assert limits["now"] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def test_a_hard_limit_that_is_too_small_is_said_before_anything_is_written(
    limits, load, private, tmp_path
):
    limits["now"] = (32, 32)
    with pytest.raises(ConfError) as caught:
        simulate(load(*private))
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1105", "sites.count")
    assert "no more than 32 files" in problem.what
    assert "ulimit -Hn" in problem.remedy
    assert list(tmp_path.iterdir()) == []


def test_without_ledgers_no_limit_is_looked_at(limits, load):
    limits["now"] = (32, 32)
    assert simulate(load("rounds.count=1", "privacy.record.enabled=false")).summary.rounds == 1


def test_that_many_files_can_be_opened():
    soft, hard = resource.getrlimit(LIMIT)
    low = len(os.listdir("/dev/fd")) + 40
    resource.setrlimit(LIMIT, (low, hard))
    try:
        with room_for_ledgers(200), ExitStack() as stack:
            for _ in range(200):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        assert resource.getrlimit(LIMIT) == (low, hard)
    finally:
        resource.setrlimit(LIMIT, (soft, hard))

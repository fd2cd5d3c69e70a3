"""A simulation with secure aggregation: the same model as without, whatever the ring hides."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import ConfError, TaskError
from lepton_fed.runs.events import read_events
from lepton_fed.simulations.sequential import Simulation, simulate

PLAIN = ("privacy.record.enabled=false", "privacy.outside_epsilon=[]", "rounds.count=2")
MANY = ("sites.count=16", "sites.names=[]", "sites.partition.name=iid",
        "sites.partition.arguments={}")  # fmt: skip


def simulated(folder: Path, *words: str) -> Simulation:
    words = (*PLAIN, *words, f"runs={folder}")
    return simulate(load_values(SimulationConf, template("simulation"), list(words)))


@pytest.mark.parametrize("post_quantum", ["false", "true"])
def test_of_one_ring_masked_and_plain_sums_make_the_same_model(
    tmp_path: Path, post_quantum: str
) -> None:
    plain = simulated(tmp_path / "plain", "privacy.secure_aggregation.enabled=false")
    masked = simulated(
        tmp_path / "masked",
        "privacy.secure_aggregation.bits=64",
        f"privacy.secure_aggregation.post_quantum={post_quantum}",
    )
    assert masked.summary.digest == plain.summary.digest
    assert masked.summary.metrics == pytest.approx(plain.summary.metrics, abs=1e-6)
    assert masked.summary.masked
    assert not plain.summary.masked
    assert all(site.metrics for site in plain.summary.sites)
    assert not any(site.metrics for site in masked.summary.sites)


def test_groups_add_up_to_the_sum_of_all(tmp_path: Path) -> None:
    one = simulated(tmp_path / "one", *MANY)
    two = simulated(tmp_path / "two", *MANY, "privacy.secure_aggregation.groups=2")
    assert two.summary.digest == one.summary.digest
    formed = [e["sites"] for e in read_events(two.folder.events) if e["event"] == "secagg.formed"]
    assert len(formed) == 6  # two rounds, and the last evaluation
    for first, second in zip(formed[::2], formed[1::2], strict=True):
        assert len(first) == len(second) == 8
        assert not set(first) & set(second)
    assert formed[0] != formed[2], "the groups are drawn anew each round"


def test_a_strategy_that_compares_updates_gets_the_means_of_groups(tmp_path: Path) -> None:
    words = ("strategy.name=flower", "strategy.arguments.strategy=FedMedian", *MANY)
    with pytest.raises(TaskError) as refused:
        simulated(tmp_path, *words)
    assert refused.value.code == "LF3403"
    assert not list(tmp_path.iterdir()), "nothing is written before"
    done = simulated(tmp_path, *words, "privacy.secure_aggregation.groups=2")
    assert done.summary.metrics["accuracy"] > 0.5


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_server_optimisers_of_flwr_take_the_sum(tmp_path: Path, name: str) -> None:
    words = ("strategy.name=flower", f"strategy.arguments.strategy={name}")
    masked = simulated(tmp_path / "masked", *words)
    plain = simulated(tmp_path / "plain", *words, "privacy.secure_aggregation.enabled=false")
    assert abs(masked.outcome.model - plain.outcome.model).max() < 1e-4


def test_too_few_sites_to_hide_one_refuse_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfError) as refused:
        simulated(tmp_path, "sites.count=2", "sites.names=[]", "rounds.quorum=1")
    assert refused.value.code == "LF1059"
    assert not list(tmp_path.iterdir())


def test_dp_of_a_masked_run_is_what_was_agreed_to_at_most(tmp_path: Path) -> None:
    words = ["rounds.count=2", f"runs={tmp_path}"]
    done = simulate(load_values(SimulationConf, template("simulation"), words))
    assert [site.epsilon for site in done.summary.sites] == [8.0] * 3
    assert all(site.noise_multiplier is None for site in done.summary.sites)
    events = read_events(done.folder.events)
    (planned,) = [event for event in events if event["event"] == "secagg.planned"]
    assert planned["bits"] == 32
    assert planned["grid"] == 2.0**-21
    assert planned["most_bits_lost_to_weight"] == 0
    assert not list(done.folder.masked.iterdir())

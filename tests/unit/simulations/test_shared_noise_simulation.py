"""Simulations in which sites share one noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.cli.simulate import privacy_lines
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import ConfError, TaskError
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.simulations.sequential import Simulation, agreement_of, simulate

SHARED = (
    "privacy.record.noise=shared", "privacy.record.sampling_rate=1", "privacy.record.clip=0.5",
    "privacy.record.honest=3", "task.model.name=linear", "task.model.arguments={}",
    "task.training.steps=1", "task.training.epochs=null", "task.training.batch_size=400",
    "task.training.momentum=0", "task.training.learning_rate=1", "rounds.count=1",
    "sites.partition.name=iid", "sites.partition.arguments={}", "rounds.evaluate=false",
    "privacy.outside_epsilon=[]",
)  # fmt: skip


def simulated(folder: Path, *words: str) -> Simulation:
    words = (*SHARED, *words, f"runs={folder}")
    return simulate(load_values(SimulationConf, template("simulation"), list(words)))


def test_the_model_moves_by_the_mean_gradient_and_one_noise(tmp_path: Path) -> None:
    """All records in the step, so that two runs differ by their noises alone."""
    models = [simulated(tmp_path / str(number)).outcome.model for number in range(3)]
    done = simulated(tmp_path / "last")
    conf = load_values(SimulationConf, template("simulation"), list(SHARED)).conf
    noise = shared_noise(agreement_of(conf, "run", conf.strategy), done.kit.layout.size)
    assert noise is not None
    wanted = noise.noise_multiplier * noise.moves / 3  # of the mean of three sites
    apart = np.concatenate([model - done.outcome.model for model in models]) / math.sqrt(2)
    assert apart.std() == pytest.approx(wanted, rel=0.15)
    assert not done.summary.repeatable
    assert done.summary.honest == 3
    text = "\n".join(privacy_lines(done.summary))
    assert "while 3 sites of a sum add theirs" in text
    assert "against everyone" not in text


def test_what_a_round_costs_is_in_each_ledger(tmp_path: Path) -> None:
    done = simulated(tmp_path, "rounds.count=2", "privacy.record.epsilon=2")
    assert [site.epsilon for site in done.summary.sites] == [2.0] * 3
    for rows in done.population:
        assert len(list(done.folder.site(rows.name).glob("ledger*"))) >= 1


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("task.training.steps=2", "LF1070"),
        ("task.training.momentum=0.5", "LF1070"),
        ("privacy.secure_aggregation.enabled=false", "LF1070"),
        ("privacy.record.sampling_rate=null", "LF1070"),
        ("privacy.record.honest=4", "LF1070"),
        ("task.aggregation.weight_bound=2", "LF1042"),
        ("strategy.name=fedprox", "LF3330"),
    ],
)
def test_what_a_share_does_not_cover_refuses_to_start(tmp_path: Path, word: str, code: str) -> None:
    with pytest.raises((ConfError, TaskError)) as refused:
        simulated(tmp_path, word)
    assert refused.value.code == code
    assert not list(tmp_path.iterdir())


def test_optimisers_of_the_coordinator_take_the_noised_sum(tmp_path: Path) -> None:
    words = ("strategy.name=flower", "strategy.arguments.strategy=FedAvgM", "rounds.count=2")
    assert np.isfinite(simulated(tmp_path, *words).outcome.model).all()

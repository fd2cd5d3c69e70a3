"""A federation in one process: repeatable, robust, and better than guessing."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lepton_fed.clients import site as site_module
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.digests import plain
from lepton_fed.core.layout import vector_digest
from lepton_fed.data.builtin import builtin_contract
from lepton_fed.errors import ConfError, DataError, LeptonError, RunError, TaskError
from lepton_fed.flower.transport import GridTransport
from lepton_fed.models.build import write_vector
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.runs.events import read_events
from lepton_fed.runs.folder import list_runs
from lepton_fed.simulations import sequential
from lepton_fed.simulations.alone import compare_with_alone
from lepton_fed.simulations.preflight import check_simulation
from lepton_fed.simulations.sequential import simulate
from lepton_fed.strategies.base import PlainSite, Strategy
from lepton_fed.strategies.fedavg import AddMean
from lepton_fed.training.evaluation import evaluate

DP = ["privacy.record.enabled=true", "privacy.record.epsilon=4"]


@pytest.fixture
def load(tmp_path):
    """Load a conf of three rounds over three sites of a built-in data set."""

    def one(*overrides, reader="digits", **task):
        contract = plain(builtin_contract(reader))
        scaled = {"step": "scale", "arguments": {"by": 16.0}}
        standardised = [{"step": "standardise"}]
        values = {
            "task": {
                "data": contract,
                "preprocessing": [scaled] if reader == "digits" else standardised,
                "model": {"name": "linear"},
                "training": {"batch_size": 32, "learning_rate": 0.3},
                **task,
            },
            "rounds": {"count": 3},
            "sites": {"source": {"reader": reader}},
            "runs": str(tmp_path / "runs"),
        }
        return load_values(SimulationConf, values, list(overrides))

    return one


def digest(loaded, **named):
    return simulate(loaded, **named).summary.digest


def test_two_runs_without_dp_share_their_digest(load, tmp_path):
    one, two = simulate(load()), simulate(load())
    assert one.summary.digest == two.summary.digest
    assert one.outcome.model.tobytes() == two.outcome.model.tobytes()
    assert one.summary.repeatable
    assert len(list_runs(tmp_path / "runs")) == 2


@pytest.mark.parametrize(
    "change",
    [
        "seed=2",
        "rounds.count=4",
        "rounds.fraction=0.7",
        "sites.names=[site-2,site-1,site-3]",
        "sites.names=[a,b,c]",
        "sites.partition.name=shards",
        "sites.held_out=0.3",
        "strategy={name: fedprox, arguments: {mu: 1.0}}",
        "strategy={name: fedavg, arguments: {server_learning_rate: 0.9}}",
        "task.training.learning_rate=0.31",
        "task.numeric.threads=2",
        "task.name=other",
    ],
)
def test_a_run_of_something_else_has_another_digest(load, change, plain_digest):
    assert digest(load(change)) != plain_digest


@pytest.fixture(scope="module")
def plain_digest(tmp_path_factory):
    made = load.__wrapped__ if hasattr(load, "__wrapped__") else None
    del made
    return digest(_loaded(tmp_path_factory.mktemp("plain")))

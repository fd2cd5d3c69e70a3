"""Small federations: three rounds over three sites of a built-in data set."""

from __future__ import annotations

import pytest

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.digests import plain
from lepton_fed.data.builtin import builtin_contract

DP = ["privacy.record.enabled=true", "privacy.record.epsilon=4"]


@pytest.fixture
def load(tmp_path):
    """Load a conf; runs go to the test's own folder."""

    def one(*overrides, reader="digits", **task):
        scale = {"step": "scale", "arguments": {"by": 16.0}}
        values = {
            "task": {
                "name": reader,
                "data": plain(builtin_contract(reader)),
                "preprocessing": [scale if reader == "digits" else {"step": "standardise"}],
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


@pytest.fixture
def private():
    """Overrides that turn record-level DP on."""
    return DP

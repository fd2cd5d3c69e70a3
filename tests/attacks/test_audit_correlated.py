"""The audit of noise that is correlated over steps: sound runs pass, planted faults are found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from lepton_fed.cli import app
from lepton_fed.clients.correlated import CorrelatedTraining
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.runs.folder import RunFolder
from lepton_fed.simulations.sequential import simulate

pytestmark = pytest.mark.audit

CONF = (
    "sites.count=2", "sites.names=[east, west]", "rounds.count=4", "rounds.quorum=1",
    "task.model={name: linear}", "task.training.epochs=null", "task.training.steps=6",
    "task.training.batch_size=128", "privacy.record.epsilon=4",
    "privacy.secure_aggregation.enabled=false", "privacy.record.mechanism=dp_ftrl",
    "privacy.record.sampler=full",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    words = [*CONF, f"runs={tmp_path_factory.mktemp('audited') / 'runs'}"]
    return simulate(load_values(SimulationConf, template("simulation"), words)).folder


def audited(run: RunFolder, *words: str) -> Result:
    return CliRunner().invoke(app, ["audit", str(run.path), *words], env={"COLUMNS": "200"})


def failed(result: Result) -> list[str]:
    assert result.exit_code == 4, result.output
    return [line.split()[0] for line in result.stdout.splitlines() if " FAIL " in line]


def test_a_sound_run_passes(finished: RunFolder) -> None:
    result = audited(finished, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    noise, contribution, bound, accounting = (check["numbers"] for check in report["checks"])
    assert abs(noise["estimated"] / noise["configured"] - 1) < 0.05
    assert 0.999 < contribution["norm"] <= 1 + 1e-5
    assert 0.2 < bound["proved"] < bound["claimed"]
    assert (report["steps"], report["adjacency"]) == (24, "zero-out-one")
    assert accounting["claimed"] == pytest.approx(accounting["ledgers"], rel=0.01)


def test_half_the_noise_is_found(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = CorrelatedNoise.__init__

    def faulty(self, coefficients, size, deviation, *more) -> None:  # type: ignore[no-untyped-def]
        sound(self, coefficients, size, deviation / 2, *more)

    monkeypatch.setattr(CorrelatedNoise, "__init__", faulty)
    assert "noise" in failed(audited(finished))


def test_noise_that_is_taken_back_and_was_never_added_is_found(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The past of each round is lost, and the next takes back nothing of it: a mechanism anew."""
    sound = CorrelatedTraining.steps

    def faulty(self: CorrelatedTraining):  # type: ignore[no-untyped-def]
        self._stream.past()[1][:] = np.float32(0)
        return sound(self)

    monkeypatch.setattr(CorrelatedTraining, "steps", faulty)
    result = audited(finished)
    assert "noise" in failed(result)


def test_the_same_noise_in_two_rounds_is_found(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that is not fresh: the difference of two rounds would be without."""
    drawn: list[np.ndarray] = []
    sound = CorrelatedNoise.next

    def faulty(self: CorrelatedNoise):  # type: ignore[no-untyped-def]
        if self.step >= 6:
            self.step += 1
            return drawn[(self.step - 1) % 6]
        drawn.append(sound(self))
        return drawn[-1]

    monkeypatch.setattr(CorrelatedNoise, "next", faulty)
    assert "noise" in failed(audited(finished))

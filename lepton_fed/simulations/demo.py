"""The main job from end to end on scikit-learn's digits, for a newcomer and for CI."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lepton_fed.config.load import Loaded, load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import BundleRefused
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.keys import generate_key, load_public_key
from lepton_fed.export.predict import ClassPredictions, predict, write_predictions
from lepton_fed.export.release import ExportReport
from lepton_fed.runs.events import Listener
from lepton_fed.simulations.alone import Comparison, compare_with_alone
from lepton_fed.simulations.release import export_run
from lepton_fed.simulations.sequential import Simulation, simulate

__all__ = ["REPEATED_ROUNDS", "Demo", "demo_conf", "run_demo"]

REPEATED_ROUNDS = 3
"""Rounds of each of the two runs that are compared."""


@dataclass(frozen=True)
class Demo:
    """What the demo did.

    Args:
        done: The simulation with record-level DP.
        comparison: Each site with and without the federation.
        report: The export.
        refusal: Why a copy of the bundle with one changed bit was refused.
        predicted: Where the predictions are.
        correct: Fraction of the predicted rows whose class is right.
        digests: Run digests of two runs of :data:`REPEATED_ROUNDS` without DP.
    """

    done: Simulation
    comparison: list[Comparison]
    report: ExportReport
    refusal: str
    predicted: Path
    correct: float
    digests: tuple[str, str]


def run_demo(
    loaded: Loaded[SimulationConf],
    folder: Path,
    listeners: tuple[Listener, ...],
    say: Callable[[str], None],
) -> Demo:
    """Run the demo.

    Args:
        loaded: Its conf, from :func:`demo_conf`.
        folder: Where everything goes.
        listeners: Called with each event of the main run.
        say: Tells the person what comes next.

    Raises:
        LeptonError: Something that should work did not.
    """
    say("training: digits over three unequal sites, record-level DP at each")
    done = simulate(loaded, listeners=listeners)
    say("comparing: what each site would get by itself, with the same steps and privacy")
    comparison = compare_with_alone(done, loaded.conf)
    say("exporting: ONNX, parity with PyTorch, signature")
    key = folder / "keys" / "coordinator.pem"
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        generate_key(key)
    report = export_run(done.folder, loaded.conf, key=key)
    say("using: a verified bundle on rows that no site trained on")
    predicted, correct = _predict(done, report, folder)
    refusal = _tampered(report, folder, key.with_suffix(".pub"))
    say("repeating: two runs without DP, which share their run digest")
    digests = (_repeat(loaded), _repeat(loaded))
    return Demo(done, comparison, report, refusal, predicted, correct, digests)


def demo_conf(folder: Path, overrides: Sequence[str] = ()) -> Loaded[SimulationConf]:
    """Return the demo's conf: the shipped simulation, with its runs below ``folder``.

    Raises:
        ConfError: An override is wrong.
    """
    runs = f"runs={folder / 'runs'}"
    return load_values(SimulationConf, template("simulation"), [runs, *overrides])


def _repeat(loaded: Loaded[SimulationConf]) -> str:
    conf = loaded.conf
    without = replace(conf.privacy, record=replace(conf.privacy.record, enabled=False))
    short = replace(conf, privacy=without, rounds=replace(conf.rounds, count=REPEATED_ROUNDS))
    return simulate(replace(loaded, conf=short)).summary.digest


def _predict(done: Simulation, report: ExportReport, folder: Path) -> tuple[Path, float]:
    rows = np.concatenate([site.held_out.inputs for site in done.population])
    truth = np.concatenate([site.held_out.targets for site in done.population])
    np.savez(folder / "new-digits.npz", inputs=rows)
    predictions = predict(report.bundle, rows)
    target = folder / "predictions.csv"
    write_predictions(predictions, target)
    if not isinstance(predictions, ClassPredictions):
        raise TypeError("digits are classes")
    return target, float((predictions.codes == truth).mean())


def _tampered(report: ExportReport, folder: Path, public: Path) -> str:
    """Change one bit of a copy of the bundle and return why it is refused."""
    copy = folder / "tampered-bundle"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(report.bundle.folder, copy)
    model = copy / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    try:
        verify_bundle(copy, load_public_key(public))
    except BundleRefused as error:
        return f"{error.problems[0].what} [{error.code}]"
    raise AssertionError("a changed bundle was accepted")

"""The main job from end to end on scikit-learn's digits, for a newcomer and for CI.

A coordinator and three sites as separate processes on this machine, TLS and node authentication
on: trained with record-level DP, exported, signed, pushed back, verified and used at each site.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lepton_fed.clients.bundles import BundleStore
from lepton_fed.config.load import Loaded, load_conf, load_values
from lepton_fed.config.schema import ClientConf, ServerConf, SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import BundleRefused, Problem, RunError
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.predict import ClassPredictions, predict, write_predictions
from lepton_fed.export.release import ExportReport
from lepton_fed.identity.keys import load_public_key
from lepton_fed.runs.events import Listener
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import RunSummary
from lepton_fed.server.jobs import Job, Jobs
from lepton_fed.server.release import export_run
from lepton_fed.simulations.alone import Comparison, compare_with_alone
from lepton_fed.simulations.deployment import COORDINATOR, LocalDeployment
from lepton_fed.simulations.population import SiteRows, populate
from lepton_fed.simulations.sequential import simulate
from lepton_fed.training.kit import build_kit

__all__ = ["REPEATED_ROUNDS", "AtSite", "Demo", "demo_conf", "run_demo"]

REPEATED_ROUNDS = 3
"""Rounds of each of the two runs that are compared."""

_PUSH_S = 300.0


@dataclass(frozen=True)
class AtSite:
    """What one site has in the end.

    Args:
        bytes_sent: Bytes of its replies over the whole run.
        version: Version of the bundle in use there.
        correct: Fraction of the new rows whose class its bundle gets right.
    """

    bytes_sent: int
    version: int
    correct: float


@dataclass(frozen=True)
class Demo:
    """What the demo did.

    Args:
        summary: The deployment's run, with record-level DP.
        comparison: Each site with and without the federation.
        report: The export.
        sites: What each site has in the end, by name.
        refusal: Why a copy of the bundle with one changed bit was refused.
        predicted: Where the predictions are.
        digests: Run digests of two simulations of :data:`REPEATED_ROUNDS` without DP.
    """

    summary: RunSummary
    comparison: list[Comparison]
    report: ExportReport
    sites: dict[str, AtSite]
    refusal: str
    predicted: Path
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
        folder: Where everything goes; what an earlier demo left there is removed.
        listeners: Called with each event of the run.
        say: Tells the person what comes next.

    Raises:
        LeptonError: Something that should work did not.
    """
    conf = loaded.conf
    for old in ("runs", "state", "rows", "conf", "logs", "keys"):
        shutil.rmtree(folder / old, ignore_errors=True)
    population = populate(conf)
    deployment = LocalDeployment(conf, folder, listeners)
    say("enrolling: keys, TLS certificate, signed roster; a policy at each site")
    deployment.prepare()
    say("training: a coordinator and three sites as processes, record-level DP at each")
    with deployment:
        run = RunFolder(deployment.wait_for_run())
        say("exporting: ONNX, parity with PyTorch, signature")
        report = export_run(
            run,
            load_conf(run.conf, [], kind=ServerConf).conf,
            key=folder / "keys" / "coordinator.pem",
        )
        say("pushing: each site verifies the bundle and takes it into use")
        _push(deployment, report)
    summary = run.read_summary()
    if summary is None:
        raise RunError(Problem("LF5206", "this run is not finished", where=str(run.path)))
    say("using: the bundle in use at each site, on rows that no site trained on")
    predicted = folder / "predictions.csv"
    sites = _use(deployment, population, run, folder, predicted)
    refusal = _tampered(report, folder, folder / "keys" / "coordinator.pub")
    say("comparing: what each site would get by itself, with the same steps and privacy")
    kit = build_kit(conf.task, conf.seed)
    comparison = compare_with_alone(
        kit, run.read_model(kit.layout), population, folder / "runs" / "alone", conf
    )
    say("repeating: two simulations without DP, which share their run digest")
    digests = (_repeat(loaded), _repeat(loaded))
    return Demo(summary, comparison, report, sites, refusal, predicted, digests)


def demo_conf(folder: Path, overrides: Sequence[str] = ()) -> Loaded[SimulationConf]:
    """Return the demo's conf: the shipped simulation, with its runs below ``folder``.

    Raises:
        ConfError: An override is wrong.
    """
    runs = f"runs={folder / 'simulations'}"
    return load_values(SimulationConf, template("simulation"), [runs, *overrides])


def _repeat(loaded: Loaded[SimulationConf]) -> str:
    conf = loaded.conf
    without = replace(conf.privacy, record=replace(conf.privacy.record, enabled=False))
    short = replace(conf, privacy=without, rounds=replace(conf.rounds, count=REPEATED_ROUNDS))
    return simulate(replace(loaded, conf=short)).summary.digest


def _push(deployment: LocalDeployment, report: ExportReport) -> None:
    job = Job("push", str(report.bundle.folder.absolute()))
    result: dict[str, Any] = Jobs(deployment.state_of(COORDINATOR)).give(job, _PUSH_S)
    if "error" in result:
        raise RunError([Problem(**problem) for problem in result["error"]["problems"]])
    for name in deployment.names:
        refusal = result["sites"][name].get("refusal")
        if refusal or result["sites"][name].get("absent"):
            raise RunError(Problem(**refusal) if refusal else Problem("LF5306", f"{name} is gone"))


def _use(
    deployment: LocalDeployment,
    population: Sequence[SiteRows],
    run: RunFolder,
    folder: Path,
    target: Path,
) -> dict[str, AtSite]:
    """Predict at each site with the bundle in use there, as `lepton-fed predict --conf` does."""
    rows = np.concatenate([site.held_out.inputs for site in population])
    truth = np.concatenate([site.held_out.targets for site in population])
    np.savez(folder / "new-digits.npz", inputs=rows)
    sent = _bytes_sent(run)
    found = {}
    for name in deployment.names:
        conf = load_conf(deployment.conf_of(name), [], kind=ClientConf).conf
        key = load_public_key(Path(conf.coordinator_key))
        store = BundleStore(Path(conf.state) / "bundles", key, conf.policy)
        bundle = verify_bundle(store.in_force(), key)
        predictions = predict(bundle, rows)
        write_predictions(predictions, target)
        if not isinstance(predictions, ClassPredictions):
            raise TypeError("digits are classes")
        correct = float((predictions.codes == truth).mean())
        found[name] = AtSite(sent.get(name, 0), bundle.manifest.version, correct)
    return found


def _bytes_sent(run: RunFolder) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in run.events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "reply.accepted":
            found[event["site"]] = found.get(event["site"], 0) + int(event["bytes"])
    return found


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

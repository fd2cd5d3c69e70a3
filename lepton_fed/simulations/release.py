"""From a simulation's run folder to a signed bundle."""

from __future__ import annotations

import json
from pathlib import Path

from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.layout import vector_digest
from lepton_fed.data.findings import quoted
from lepton_fed.data.read import read
from lepton_fed.errors import Problem, RunError, TaskError
from lepton_fed.export.keys import load_private_key
from lepton_fed.export.release import ExportReport, export_model
from lepton_fed.runs.folder import RunFolder, list_runs
from lepton_fed.training.kit import build_kit

__all__ = ["export_run", "next_version"]


def export_run(
    folder: RunFolder,
    conf: SimulationConf,
    *,
    key: Path,
    target: Path | None = None,
    version: int | None = None,
) -> ExportReport:
    """Export the model of a finished run and sign it.

    Args:
        folder: The run.
        conf: Its conf; source and device may differ from the run's, the task may not.
        key: The coordinator's private key.
        target: Where the bundle goes; the run's own folder when None.
        version: The bundle's version; one more than the newest of this task when None.

    Raises:
        TaskError: The model keeps tensors at its sites.
        RunError: The run is not finished, or its model is not the one its summary names.
        LeptonError: Whatever :func:`lepton_fed.export.release.export_model` raises.
    """
    private_key = load_private_key(key)
    summary = folder.read_summary()
    if summary is None:
        raise RunError(
            Problem("LF5206", "this run is not finished", where=str(folder.path),
                    remedy="`lepton-fed runs list` shows which are")
        )  # fmt: skip
    kit = build_kit(conf.task, conf.seed)
    at_sites = [entry.name for entry in kit.layout.of_rule("local")]
    if at_sites:
        raise TaskError(
            Problem("LF3402", f"{len(at_sites)} tensors of the model stay at their sites "
                    f"({quoted(at_sites[0])}, ...), so there is no one model to export",
                    key="task.model.local", remedy="a model without local tensors and BatchNorm")
        )  # fmt: skip
    model = folder.read_model(kit.layout)
    if vector_digest(kit.layout, model) != summary.model:
        raise RunError(
            Problem("LF5207", "the model is not the one that the run's summary names",
                    where=str(folder.path / "model.safetensors"),
                    remedy="restore the file, or run again")
        )  # fmt: skip
    module = kit.predictor(model)
    weights = {name: value.detach().numpy() for name, value in kit.model.state_dict().items()}
    examples = read(conf.sites.source, conf.task.data).inputs
    return export_model(
        task=conf.task,
        summary=summary,
        module=module,
        weights=weights,
        examples=examples,
        private_key=private_key,
        folder=target or folder.bundle,
        version=version or next_version(folder.path.parent, conf.task.digest),
    )


def next_version(root: Path, task: str) -> int:
    """Return one more than the newest version of a task's bundles among the runs.

    Args:
        root: Folder of all runs.
        task: Digest of the task.

    Raises:
        RunError: A bundle's manifest cannot be read.
    """
    newest = 0
    for run in list_runs(root):
        manifest = run.bundle / "manifest.json"
        if manifest.is_file():
            try:
                record = json.loads(manifest.read_bytes())
                if record["task"] == task:
                    newest = max(newest, int(record["version"]))
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    Problem("LF5208", "an earlier bundle's manifest cannot be read, so the next "
                            "version is not known", where=str(manifest),
                            remedy="give the version yourself: --version N")
                ) from error  # fmt: skip
    return newest + 1

"""From a run folder to a signed bundle."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.config.schema import ServerConf, SimulationConf
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.layout import vector_digest
from lepton_fed.data.drawn import drawn_inputs, pixel_range
from lepton_fed.data.read import read
from lepton_fed.errors import Problem, RunError, TaskError, quoted
from lepton_fed.export.release import ExportReport, export_model
from lepton_fed.identity.keys import load_private_key
from lepton_fed.runs.files import reading, write_atomic
from lepton_fed.runs.folder import RunFolder
from lepton_fed.training.kit import build_kit

__all__ = ["export_run", "next_version"]

_VERSIONS = "versions.json"
_DRAWN = 512


def export_run(
    folder: RunFolder,
    conf: SimulationConf | ServerConf,
    *,
    key: Path,
    target: Path | None = None,
    version: int | None = None,
) -> ExportReport:
    """Export the model of a finished run and sign it.

    Args:
        folder: The run.
        conf: Its conf; source and device may differ from the run's, the task may not. A
            coordinator has no rows: the model is compared on inputs drawn from the contract.
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
    weights = {name: value.detach().numpy() for name, value in module[1].state_dict().items()}
    real = isinstance(conf, SimulationConf)
    examples = (
        read(conf.sites.source, conf.task.data).inputs
        if isinstance(conf, SimulationConf)
        else drawn_inputs(conf.task.data, _DRAWN, conf.seed, pixel_range(conf.task))
    )
    following = next_version(folder.path.parent, conf.task.digest)  # also: it can be read
    chosen = version or following
    report = export_model(
        task=conf.task,
        summary=summary,
        module=module,
        weights=weights,
        examples=examples,
        real_examples=real,
        private_key=private_key,
        folder=target or folder.bundle,
        version=chosen,
    )
    _remember_version(folder.path.parent, conf.task.digest, chosen)
    return report


def next_version(root: Path, task: str) -> int:
    """Return one more than the newest version of a task's bundles that were made from these runs.

    Args:
        root: Folder of all runs; ``versions.json`` in it remembers, wherever a bundle went.
        task: Digest of the task.

    Raises:
        RunError: The file cannot be read.
    """
    return _versions(root).get(task, 0) + 1


def _remember_version(root: Path, task: str, version: int) -> None:
    versions = _versions(root)
    versions[task] = max(version, versions.get(task, 0))
    write_atomic(root / _VERSIONS, canonical_json(versions) + b"\n")


def _versions(root: Path) -> dict[str, int]:
    path = root / _VERSIONS
    if not path.exists():
        return {}
    with reading(path):
        content = path.read_bytes()
    try:
        found = decode(dict[str, int], strict_json(content))
        if any(version < 1 for version in found.values()):
            raise ValueError("a version is below 1")
        return found
    except ValueError as error:
        raise RunError(
            Problem("LF5208", f"the versions of earlier bundles cannot be read: {error}",
                    where=str(path), remedy="restore the file; a site refuses a version twice")
        ) from error  # fmt: skip

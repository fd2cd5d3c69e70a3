"""From a trained model to a signed bundle: export, compare, describe, write, verify."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.core.decode import task_from_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError, capped, quoted
from lepton_fed.export.bundle import VerifiedBundle
from lepton_fed.export.card import model_card
from lepton_fed.export.manifest import Parity, Release
from lepton_fed.export.onnx import export_onnx
from lepton_fed.export.parity import check_parity
from lepton_fed.export.writing import refuse_existing, write_bundle
from lepton_fed.identity.signature import PrivateKey, fingerprint
from lepton_fed.runs.summary import RunSummary

__all__ = ["ExportReport", "export_model"]

_PACKAGES = ("lepton-fed", "cryptography", "numpy", "onnx", "onnxruntime", "safetensors", "torch")


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Args:
        bundle: The bundle, as a site would read it.
        signer: Fingerprint of the key that signed it.
        parity: The exported model against the trained one.
        size_bytes: Bytes of the listed files together.
        seconds: Wall-clock seconds of each phase: ``export``, ``parity``, ``card``, ``write``
            (which verifies).
    """

    bundle: VerifiedBundle
    signer: str
    parity: Parity
    size_bytes: int
    seconds: dict[str, float]


def export_model(
    *,
    task: Task,
    summary: RunSummary,
    module: nn.Module,
    weights: Mapping[str, npt.NDArray[np.generic]],
    examples: npt.NDArray[np.generic],
    real_examples: bool = True,
    private_key: PrivateKey,
    folder: Path,
    version: int,
    created: datetime | None = None,
) -> ExportReport:
    """Export a model and write it as a signed bundle; on any error nothing is written.

    Args:
        task: What was learned.
        summary: What the run says of itself.
        module: Preprocessing and model in one, ``nn.Sequential(preprocessing, model)`` say, on
            the CPU, in eval mode.
        weights: The model's tensors as its ``state_dict`` names them; they must be the ones that
            ``module``, or one of its parts, computes with.
        examples: Inputs as read, ``[rows, *example shape]``, at least one row. They are
            computed with and not kept.
        real_examples: Whether they are real, or drawn from the contract; the card says so.
        private_key: The coordinator's key.
        folder: The bundle to make; must not exist.
        version: Counter of the task's bundles, from 1: a site refuses one older than its own.
        created: Time of the export; now by default.

    Returns:
        What was done.

    Raises:
        TaskError: LF3201 to LF3207, the model cannot be exported or differs; LF3208 to LF3211, the
            bundle cannot be written; LF3212, ``version`` is not positive; LF3213, task and summary
            do not belong together; LF3214, ``weights`` are not the module's.
        BundleRefused: The bundle written cannot be verified; it was removed.
    """
    _check_inputs(task, summary, module, weights, version)
    refuse_existing(folder)
    seconds: dict[str, float] = {}
    with _timed(seconds, "export"):
        model = export_onnx(module, task, examples)
    with _timed(seconds, "parity"):
        parity = check_parity(model, module, task, examples, real=real_examples)
    signer = fingerprint(private_key.public_key())
    release = Release(
        version=version,
        created=(created or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        parity=parity,
        exported_with={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    )
    with _timed(seconds, "card"):
        card = model_card(task, summary, release, signer)
    with _timed(seconds, "write"):
        bundle = write_bundle(
            folder,
            task=task,
            summary=summary,
            release=release,
            onnx=model,
            weights=weights,
            card=card,
            private_key=private_key,
        )
    size = sum(record.bytes for record in bundle.manifest.files.values())
    return ExportReport(bundle, signer, parity, size, seconds)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _check_inputs(
    task: Task,
    summary: RunSummary,
    module: nn.Module,
    weights: Mapping[str, npt.NDArray[np.generic]],
    version: int,
) -> None:
    problems = []
    if version < 1:
        problems.append(
            Problem("LF3212", f"version {version} is not a version", remedy="count from 1")
        )
    try:
        task_from_json(canonical_json(task))
    except ValueError as error:
        problems.append(
            Problem("LF3213", f"the task could not be read back: {error}", remedy="mend the task")
        )
    if summary.task != task.digest:
        problems.append(
            Problem(
                "LF3213",
                f"the run {quoted(summary.run)} trained another task than the one given",
                remedy="export with the conf that lies in the run's folder",
            )
        )
    problems += [
        Problem("LF3214", what, remedy="load the run's weights into the model before the export")
        for what in _foreign(module, weights)
    ]
    if problems:
        raise TaskError(capped(problems, "LF3249"))


def _foreign(module: nn.Module, weights: Mapping[str, npt.NDArray[np.generic]]) -> Iterator[str]:
    """Yield what keeps ``weights`` from being those of the model: both are signed as one."""
    states = [part.state_dict() for part in (*module.children(), module)]
    if not weights:
        yield "there are no weights"
    for name, array in weights.items():
        given = torch.tensor(array)
        found = [state[name].cpu() for state in states if name in state]
        if not found:
            yield f"the model has no tensor {quoted(name)}"
        elif not any(_same(tensor, given) for tensor in found):
            yield f"the model computes with another {quoted(name)} than the one given"


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)

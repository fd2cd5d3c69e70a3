"""Models small enough to export in a second, exported once for the whole room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from lepton_fed.core.task import Column, DataContract, Step, Target, Task
from lepton_fed.export.onnx import export_onnx
from lepton_fed.export.release import ExportReport, export_model
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.runs.summary import RunSummary, SiteSummary

KEY = PrivateKey.from_private_bytes(bytes(range(32)))


class Impute(nn.Module):
    """Missing numbers and scale: the shape of a table's preprocessing, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fill", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.register_buffer("scale", torch.tensor([2.0, 4.0, 0.5]), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (torch.where(torch.isnan(rows), self.fill, rows) - self.fill) / self.scale


class Pixels(nn.Module):
    """Bytes to numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() / 255


@dataclass(frozen=True)
class Trained:
    """A module, its task, real-looking inputs, and the exported file."""

    module: nn.Sequential
    task: Task
    examples: npt.NDArray[np.generic]
    onnx: bytes

    @property
    def weights(self) -> dict[str, npt.NDArray[np.generic]]:
        return {name: value.numpy() for name, value in self.module[-1].state_dict().items()}

    def torch(self, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            answer: npt.NDArray[np.float32] = self.module(torch.tensor(rows)).numpy()
        return answer


def trained(module: nn.Sequential, task: Task, examples: npt.NDArray[np.generic]) -> Trained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    module.eval()
    return Trained(module, task, examples, export_onnx(module, task, examples))


TABLE = [
    Column("age", minimum=0, maximum=120, fill=1.0),
    Column("mean_radius", fill=2.0),
    Column("dose", minimum=0.5),
]


def table(rows: int) -> npt.NDArray[np.float32]:
    found = np.random.default_rng(5).normal(2, 3, (rows, 3)).astype(np.float32)
    found[::4, 1] = np.nan
    return found


@pytest.fixture(scope="session")
def mlp() -> Trained:
    """Three classes from a table with missing numbers."""
    task = Task(
        name="wards",
        data=DataContract(columns=TABLE, target=Target(name="ward", classes=["a", "b", "c"])),
        preprocessing=[Step("impute"), Step("standardise")],
        metrics=["accuracy"],
    )
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
    return trained(nn.Sequential(Impute(), model), task, table(5))


@pytest.fixture(scope="session")
def cnn() -> Trained:
    """Four classes from 8-bit images, exported from a single example."""
    task = Task(
        name="images",
        data=DataContract(
            kind="image", shape=[1, 6, 6], dtype="uint8", target=Target(classes=list("wxyz"))
        ),
    )
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    one = np.random.default_rng(6).integers(0, 256, (1, 1, 6, 6), dtype=np.uint8)
    return trained(nn.Sequential(Pixels(), model), task, one)


@pytest.fixture(scope="session")
def regressor() -> Trained:
    """A number from a table."""
    task = Task(
        name="dosage",
        data=DataContract(
            columns=TABLE, target=Target(kind="number", name="mg", minimum=0, maximum=9)
        ),
        metrics=["mae", "r2"],
    )
    return trained(nn.Sequential(Impute(), nn.Sequential(nn.Linear(3, 1))), task, table(40))


SummaryOf = Callable[..., RunSummary]


@pytest.fixture(scope="session")
def summary_of() -> SummaryOf:
    """Make the summary of a task's run; keywords replace what it says."""

    def make(task: Task, **changes: object) -> RunSummary:
        facts: dict[str, object] = {
            "run": "2026-01-02T030405-wards-ab12",
            "task": task.digest,
            "layout": "1" * 64,
            "model": "2" * 64,
            "digest": "3" * 64,
            "repeatable": True,
            "seed": 7,
            "rounds": 20,
            "strategy": "fedavg",
            "parameters": 1234,
            "metrics": {"loss": 0.31234, "accuracy": 0.912345},
            "error_bounds": {},
            "delta": None,
            "clip": None,
            "outside_epsilon": [],
            "finished": "2026-01-02T03:05:06Z",
            "seconds": 12.5,
            "versions": {"torch": "2.13.0"},
            "sites": [
                SiteSummary("north", 20, {"loss": 0.2, "accuracy": 0.95}),
                SiteSummary("south", 19, {"loss": 0.4, "accuracy": 0.81}),
            ],
        }
        return RunSummary(**{**facts, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def exported(
    mlp: Trained, summary_of: SummaryOf, tmp_path_factory: pytest.TempPathFactory
) -> ExportReport:
    """The MLP as a signed bundle; tests read it and do not change it."""
    folder: Path = tmp_path_factory.mktemp("exported") / "bundle"
    return export_model(
        task=mlp.task,
        summary=summary_of(mlp.task),
        module=mlp.module,
        weights=mlp.weights,
        examples=mlp.examples,
        private_key=KEY,
        folder=folder,
        version=3,
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )

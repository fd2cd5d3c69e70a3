"""The task: what is learned, declared by names and numbers, never by code.

A task is the part of a conf that the coordinator and every site must agree on. Its canonical digest
is that agreement: two parties with the same digest train the same model, on data of the same shape,
in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lepton_fed.core.digests import digest_of
from lepton_fed.core.settings import setting

__all__ = [
    "Aggregation",
    "Column",
    "DataContract",
    "ModelSpec",
    "Numeric",
    "Schedule",
    "Step",
    "Target",
    "Task",
    "TrainingSpec",
]


@dataclass(frozen=True)
class Column:
    """One column of a table, in the order in which the model sees them."""

    name: str = setting(doc="Name of the column in the site's file.")
    kind: Literal["number", "category"] = setting(
        "number", "number, or category (a word out of `values`)."
    )
    values: list[str] = setting(
        factory=list, doc="The words of a category, in the order of their codes."
    )
    mean: float = setting(0.0, "Public constant that `standardise` subtracts.")
    std: float = setting(1.0, "Public constant that `standardise` divides by.", above=0)
    fill: float | None = setting(
        None, "Value that `impute` puts where a number is missing; none refuses missing ones."
    )
    minimum: float | None = setting(None, "Smallest value the contract admits.")
    maximum: float | None = setting(None, "Largest value the contract admits.")


@dataclass(frozen=True)
class Target:
    """What is predicted."""

    kind: Literal["classes", "number"] = setting("classes", "classes or number (regression).")
    name: str = setting("label", "Column (CSV) or array (NPZ) that holds the target.")
    classes: list[str] = setting(
        factory=list, doc="Names of the classes, in the order of the model's outputs."
    )
    minimum: float | None = setting(None, "Smallest number the contract admits as a target.")
    maximum: float | None = setting(None, "Largest number the contract admits as a target.")


@dataclass(frozen=True)
class DataContract:
    """What a site's data must look like."""

    kind: Literal["image", "table"] = setting("table", "image or table.")
    shape: list[int] = setting(
        factory=list,
        doc="Shape of one example as read: [channels, height, width] for an image, "
        "[columns] for a table (may be left out there).",
    )
    dtype: Literal["float32", "uint8"] = setting(
        "float32", "Element type as read; tables are always float32."
    )
    columns: list[Column] = setting(factory=list, doc="The columns of a table, in order.")
    target: Target = setting(factory=Target, doc="What is predicted.")

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Return the shape of one example as read, without the batch axis."""
        return tuple(self.shape) if self.shape else (len(self.columns),)


@dataclass(frozen=True)
class Step:
    """One preprocessing or augmentation step, by name."""

    step: str = setting(doc="Name of the step.")
    arguments: dict[str, Any] = setting(factory=dict, doc="Its arguments.")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, by name."""

    name: str = setting("mlp", "Name of an installed model: linear, mlp, cnn, ...")
    arguments: dict[str, Any] = setting(factory=dict, doc="Arguments of the model.")
    local: list[str] = setting(
        factory=list,
        doc="Patterns of tensors that stay at their site and are never averaged.",
        advanced=True,
    )
    frozen: list[str] = setting(
        factory=list,
        doc="Patterns of tensors that are neither trained nor sent.",
        advanced=True,
    )
    fix: bool = setting(
        False,
        "Replace layers that record-level DP cannot take by ones that it can: BatchNorm by "
        "GroupNorm, attention and recurrent layers by ones made of linear layers. What is exported "
        "has the usual attention and recurrent layers again.",
        advanced=True,
    )


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes over the whole run."""

    name: Literal["constant", "linear", "cosine", "step"] = setting(
        "constant", "constant, linear (to `final`), cosine (to `final`) or step."
    )
    final: float = setting(
        0.0,
        "Fraction of the learning rate left at the end (linear, cosine).",
        at_least=0,
        at_most=1,
    )
    every: int = setting(10, "Rounds between two drops (step).", at_least=1, advanced=True)
    factor: float = setting(0.5, "Factor of each drop (step).", above=0, at_most=1, advanced=True)
    warmup_rounds: int = setting(
        0, "Rounds over which the rate rises linearly to its full value.", at_least=0, advanced=True
    )


@dataclass(frozen=True)
class TrainingSpec:
    """What a site does with its data in a round."""

    epochs: int | None = setting(
        1, "Passes over the site's rows in a round; give either this or `steps`.", at_least=1
    )
    steps: int | None = setting(
        None, "Optimiser steps in a round; give either this or `epochs`.", at_least=1
    )
    batch_size: int = setting(
        32, "Rows in a step; with record-level DP the expected number of rows.", at_least=1
    )
    optimiser: Literal["sgd", "adam", "adamw"] = setting("sgd", "sgd, adam or adamw.")
    learning_rate: float = setting(0.1, "Learning rate.", above=0)
    momentum: float = setting(0.0, "Momentum (sgd).", at_least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay.", at_least=0)
    max_gradient_norm: float | None = setting(
        None, "Clip the gradient of a step to this Euclidean norm; none leaves it.", above=0
    )
    schedule: Schedule = setting(factory=Schedule, doc="Learning rate over the run.")


@dataclass(frozen=True)
class Numeric:
    """Settings that change the last bits of a result, hence part of the task."""

    threads: int = setting(1, "CPU threads of the training function.", at_least=1, at_most=256)
    memory_format: Literal["contiguous", "channels_last"] = setting(
        "contiguous", "Memory layout of image tensors; channels_last is faster on most CPUs."
    )
    precision: Literal["float32", "bf16"] = setting(
        "float32", "float32, or bf16 autocast of forward and backward pass."
    )
    deterministic: bool = setting(
        True, "Use deterministic kernels only; refuses a model that has none.", advanced=True
    )


@dataclass(frozen=True)
class Aggregation:
    """How updates are weighted, and the bounds beyond which one is refused."""

    weight: Literal["equal", "rows"] = setting(
        "equal",
        "equal gives each site weight 1, a public constant; rows weights by row count, "
        "which tells it to the coordinator (refused with record-level DP).",
    )
    weight_bound: float = setting(
        1.0, "Largest weight a site may claim; with `rows` its row count is capped here.", above=0
    )
    norm_bound: float = setting(1e4, "Largest Euclidean norm of an update.", above=0, at_most=1e12)


@dataclass(frozen=True)
class Task:
    """What is learned. Coordinator and sites agree on its digest."""

    name: str = setting("task", "Short name, used for run folders and bundles.")
    data: DataContract = setting(factory=DataContract, doc="What a site's data must look like.")
    preprocessing: list[Step] = setting(
        factory=list, doc="Steps before the model, in order; they travel with the exported model."
    )
    augmentation: list[Step] = setting(
        factory=list, doc="Random changes of training images, in order."
    )
    model: ModelSpec = setting(factory=ModelSpec, doc="Which model.")
    training: TrainingSpec = setting(factory=TrainingSpec, doc="What a site does in a round.")
    metrics: list[str] = setting(
        factory=list,
        doc="Metrics on held-out rows: accuracy, precision, recall, macro_f1, auc; mae, r2. "
        "The loss is always there.",
    )
    aggregation: Aggregation = setting(factory=Aggregation, doc="Weights and bounds of updates.")
    numeric: Numeric = setting(factory=Numeric, doc="Threads, memory layout and precision.")

    @property
    def digest(self) -> str:
        """Return the canonical SHA-256 digest, 64 hexadecimal digits."""
        return digest_of("lepton-fed task 1", self)

    @property
    def outputs(self) -> int:
        """Return the width of the model's last layer."""
        target = self.data.target
        return len(target.classes) if target.kind == "classes" else 1

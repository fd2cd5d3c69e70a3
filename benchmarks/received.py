"""What a coordinator receives of a site, made by the project's own code.

Rows are scikit-learn's digits, the model is its own; nothing here is part of a federation.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

from lepton_fed.core.layout import Vector
from lepton_fed.core.ring import RingEncoding
from lepton_fed.core.task import DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.models.build import read_vector, write_vector
from lepton_fed.privacy.dp.accounting import SampledGaussian, noise_multiplier_for
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.privacy.secagg import masks
from lepton_fed.privacy.secagg.vector import MaskedLayout
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train

__all__ = [
    "CLASSES",
    "CLIP",
    "DELTA",
    "Images",
    "Recipe",
    "as_masked",
    "images",
    "kit_of",
    "prepared",
    "update",
]

CLASSES = 10
CLIP = 1.0
DELTA = 1e-5
_BOUND = 100.0

Numbers = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Args:
        inputs: ``[n, 64]`` float32 in [0, 1].
        targets: ``[n]`` int64.
    """

    inputs: Numbers
    targets: Codes

    def take(self, rows: npt.NDArray[np.integer]) -> Images:
        """Return some of them."""
        return Images(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True)
class Recipe:
    """How a site trains: full batches, plain SGD.

    Args:
        steps: Steps before the update leaves.
        learning_rate: Of each.
        epsilon: Record-level DP of all steps at :data:`DELTA`; None without.
        noiseless: A planted fault: clip, claim epsilon, add no noise.
    """

    steps: int
    learning_rate: float
    epsilon: float | None = None
    noiseless: bool = False

    @property
    def noise_multiplier(self) -> float:
        """Return the noise over the clipping norm that is added."""
        if self.epsilon is None or self.noiseless:
            return 0.0
        return noise_multiplier_for(self.epsilon, DELTA, SampledGaussian(1.0, 1.0, self.steps))


def images(count: int, wrong: float = 0.0, seed: int = 1) -> Images:
    """Return some of the digits, a fraction of them with a wrong label.

    What is labelled wrongly must be memorised to be got right: its membership shows best.
    """
    draws = np.random.default_rng(seed)
    inputs, targets = load_digits(return_X_y=True)
    rows = draws.permutation(len(targets))[:count]
    labels = targets[rows].astype(np.int64)
    changed = draws.random(count) < wrong
    labels[changed] = (labels[changed] + draws.integers(1, CLASSES, int(changed.sum()))) % CLASSES
    return Images((inputs[rows] / 16.0).astype(np.float32), labels)


def kit_of(model: str, **arguments: object) -> TaskKit:
    """Return the kit of a task on the digits as rows of 64 numbers."""
    task = Task(
        name="attacked",
        data=DataContract(
            kind="image",
            shape=[1, 8, 8],
            dtype="float32",
            target=Target(classes=[str(digit) for digit in range(CLASSES)]),
        ),
        model=ModelSpec(model, dict(arguments)),
    )
    return build_kit(task, 1)


def prepared(kit: TaskKit, rows: Images) -> LocalRows:
    """Return images as the model takes them."""
    inputs = torch.from_numpy(rows.inputs.reshape(-1, *kit.shape))
    return LocalRows(inputs, torch.from_numpy(rows.targets))


def update(kit: TaskKit, rows: Images, recipe: Recipe, seed: int = 1) -> Vector:
    """Train from the kit's first model and return what a site would send, ``[size]`` float32."""
    spec = TrainingSpec(
        epochs=None, steps=recipe.steps, batch_size=len(rows.targets),
        learning_rate=recipe.learning_rate,
    )  # fmt: skip
    private = None
    if recipe.epsilon is not None:
        sampler = PoissonSampler(len(rows.targets), len(rows.targets))
        private = PrivateTraining(CLIP, recipe.noise_multiplier, Entropy.from_system(), sampler)
    write_vector(kit.model, kit.layout, kit.initial)
    train(
        kit.model,
        kit.layout,
        prepared(kit, rows),
        replace(kit.task, training=spec),
        PlainSite(),
        None,
        Moment(seed, 1, 1, "attacked"),
        devices=[torch.device("cpu")],
        private=private,
    )
    return read_vector(kit.model, kit.layout) - kit.initial


def as_masked(vector: Vector, sites: int = 3) -> Vector:
    """Return what a coordinator makes of one masked vector: the ring words, read as numbers."""
    encoding = RingEncoding.plan(
        cohort=sites, coordinate_bound=_BOUND, weight_bound=1.0, bits=32
    )  # fmt: skip
    layout = MaskedLayout(encoding, ("delta",), len(vector))
    words, _ = layout.encode({"delta": vector}, 1.0)
    masks.apply(words, plus=[secrets.token_bytes(16)], minus=[secrets.token_bytes(16)], bits=32)
    signed = words[: len(vector)].astype(np.int64)
    signed[signed >= 2**31] -= 2**32
    return (signed * encoding.grid / encoding.encode_weight(1.0)).astype(np.float32)

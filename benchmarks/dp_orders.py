"""What a fixed order of the rows costs in accuracy, with fresh and with correlated noise: digits.

    python -m benchmarks.dp_orders [--seeds 5] [--epsilons 1,3,8]

One site of 1440 rows trains a linear model, delta 1e-5, with the project's own step: DP-SGD in the
order of the rows (a Gaussian a pass), DP-FTRL in the same order, and, for comparison, DP-SGD with
the Poisson samples that such a site cannot draw. Batches of 36 rows, 40 steps a pass. Learning rate
and number of passes are chosen for each by three-fold cross-validation over the training rows; the
357 test rows are looked at with what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.datasets import load_digits

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import RecordPrivacy, SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.data.dataset import Dataset
from lepton_fed.models.build import write_vector
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import CorrelatedSteps
from lepton_fed.privacy.factorisation.mechanism import FixedOrder
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.evaluation import evaluate
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.local import Moment, PrivateTraining, train
from lepton_fed.training.noise import plan_noise

ROWS, BATCH, FOLDS = 1440, 36, 3
RATES, PASSES = (0.5, 1.0, 2.0, 4.0), (2, 8)
RECORD = RecordPrivacy(enabled=True, clip=0.5, engine="bookkeeping")
WAYS = {
    "full, fresh noise": replace(RECORD, sampler="full"),
    "full, correlated noise": replace(RECORD, sampler="full", mechanism="dp_ftrl"),
    "poisson, fresh noise": RECORD,
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Choice:
    """What is chosen by cross-validation.

    Args:
        rate: Learning rate.
        passes: Passes over the rows.
    """

    rate: float
    passes: int


def kit_of(choice: Choice) -> TaskKit:
    """Return the kit of a linear model on pictures of norm 1."""
    words = [
        "task.model={name: linear}", "task.metrics=[accuracy]", "task.augmentation=[]",
        f"task.training.batch_size={BATCH}", f"task.training.epochs={choice.passes}",
        "task.training.steps=null", "task.training.momentum=0",
        f"task.training.learning_rate={choice.rate}",
        "task.preprocessing=[{step: scale, arguments: {by: 16.0}}, {step: normalise, "
        "arguments: {mean: [0.3], std: [1.0]}}, {step: unit_norm}]",
    ]  # fmt: skip
    return build_kit(load_values(SimulationConf, template("simulation"), words).conf.task, 1)


def accuracy(record: RecordPrivacy, choice: Choice, rows: Dataset, held_out: Dataset) -> float:
    """Train once, and return the accuracy on other rows."""
    kit, entropy = kit_of(choice), Entropy.from_system()
    plan = plan_noise(kit, record, len(rows), 1)
    correlated = None
    if isinstance(plan.sampler, FixedOrder):
        mechanism, noise = plan.sampler.mechanism, plan.noise_multiplier
        stream = mechanism.noise(kit.noised_size, record.clip, noise, entropy)
        correlated = CorrelatedSteps(stream)
    private = PrivateTraining(
        record.clip, plan.noise_multiplier, entropy, plan.sampler, record.engine,
        other_noise=correlated,
    )  # fmt: skip
    model = kit.model_on(CPU)
    write_vector(model, kit.layout, kit.initial)
    train(
        model, kit.layout, kit.prepare(rows, CPU), kit.task, PlainSite(), None,
        Moment(0, 1, 1, "one"), devices=[CPU], private=private,
    )  # fmt: skip
    counts = evaluate(model, kit.prepare(held_out, CPU), kit.task, kit.plan, CPU)
    return kit.plan.values(counts)["accuracy"]


def chosen(record: RecordPrivacy, rows: Dataset) -> Choice:
    """Return what has the best mean accuracy over the folds of the training rows."""
    folds = np.array_split(np.random.default_rng(1).permutation(len(rows)), FOLDS)
    scores: dict[Choice, float] = {}
    for rate, passes in itertools.product(RATES, PASSES):
        choice = Choice(rate, passes)
        scores[choice] = sum(
            accuracy(
                record,
                choice,
                rows.take(np.concatenate([fold for fold in folds if fold is not held_out])),
                rows.take(held_out),
            )
            for held_out in folds
        )
    return max(scores, key=lambda choice: scores[choice])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilons", default="1,3,8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    every = Dataset(pictures.astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64))
    rows, held_out = every.take(order[:ROWS]), every.take(order[ROWS:])
    print("| epsilon | way | passes | learning rate | accuracy (range) |\n|---|---|---|---|---|")
    for epsilon in map(float, arguments.epsilons.split(",")):
        for way, said in WAYS.items():
            record = replace(said, epsilon=epsilon)
            choice = chosen(record, rows)
            found = []
            for seed in range(arguments.seeds):  # of the order of the rows; noise has no seed
                mixed = rows.take(np.random.default_rng(seed).permutation(ROWS))
                found.append(100 * accuracy(record, choice, mixed, held_out))
            print(
                f"| {epsilon:g} | {way} | {choice.passes} | {choice.rate:g} | "
                f"{statistics.mean(found):.1f} % ({min(found):.1f} to {max(found):.1f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

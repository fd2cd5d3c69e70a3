"""The local training step: one function for every engine, at a real site and in simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_fed.core.layout import Layout
from lepton_fed.core.seeds import derive_seed
from lepton_fed.core.task import Schedule, Task, TrainingSpec
from lepton_fed.errors import Problem, RunError, TaskError
from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.engines.base import EngineName
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.planning import steps_a_round
from lepton_fed.privacy.dp.sampling import Sampler
from lepton_fed.privacy.dp.step_noise import IndependentSteps, StepNoise
from lepton_fed.strategies.base import SiteRule
from lepton_fed.training.device import model_on
from lepton_fed.training.numeric import arranged, autocast, numeric_settings

__all__ = [
    "LocalRows",
    "Moment",
    "PrivateTraining",
    "Trained",
    "check_private",
    "learning_rate_factor",
    "record_losses",
    "steps_of",
    "train",
]

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class LocalRows:
    """A site's preprocessed rows, on the device that trains on them.

    Args:
        inputs: ``[rows, ...]`` float32.
        targets: ``[rows]``: int64 class codes or float32 numbers.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.targets.shape[0])


@dataclass(frozen=True)
class Moment:
    """Where in a run a training call stands; the source of its random choices.

    Args:
        seed: Seed of the run.
        round_number: Round, from 1.
        rounds: Rounds of the run.
        site: Name of the site.
    """

    seed: int
    round_number: int
    rounds: int
    site: str

    def seed_of(self, purpose: str) -> int:
        """Return the seed of one purpose."""
        return derive_seed(self.seed, purpose, round_number=self.round_number, site=self.site)


@dataclass(frozen=True)
class PrivateTraining:
    """Record-level DP of a training call.

    Args:
        clip: Euclidean norm to which a record's gradient is clipped.
        noise_multiplier: Standard deviation of the noise over ``clip``.
        entropy: The site's own entropy, for sampling and noise.
        sampler: Draws the batches.
        engine: What clips and sums.
        most_records: Records that go through the model at once; None sets no limit.
        other_noise: Adds the noise of each step in the place of independent noise.
    """

    clip: float
    noise_multiplier: float
    entropy: Entropy
    sampler: Sampler
    engine: EngineName = "hooks"
    most_records: int | None = None
    other_noise: StepNoise | None = None

    @property
    def noise(self) -> StepNoise:
        """Return what adds the noise of each step."""
        std = self.noise_multiplier * self.clip
        return self.other_noise or IndependentSteps(std, self.entropy)


@dataclass(frozen=True)
class Trained:
    """What a training call did.

    Args:
        steps: Optimiser steps taken.
        learning_rate: Learning rate of the last step.
    """

    steps: int
    learning_rate: float


def steps_of(training: TrainingSpec, rows: int, sampler: Sampler | None = None) -> int:
    """Return the optimiser steps of one round.

    Args:
        training: The task's training.
        rows: Rows of the site.
        sampler: Draws a step's records under record-level DP; None without it.
    """
    if sampler is not None:
        return steps_a_round(sampler, training.epochs, training.steps)
    if training.steps is not None:
        return training.steps
    return (training.epochs or 1) * math.ceil(rows / training.batch_size)


def learning_rate_factor(
    schedule: Schedule, round_number: int, rounds: int, within: float
) -> float:
    """Return the factor on the learning rate at a point of the run.

    Args:
        schedule: The task's schedule.
        round_number: Round, from 1.
        rounds: Rounds of the run.
        within: Fraction of the round's steps already taken, in [0, 1).
    """
    done = round_number - 1 + within
    progress = done / rounds
    factor = 1.0
    if schedule.name == "linear":
        factor = 1.0 - (1.0 - schedule.final) * progress
    elif schedule.name == "cosine":
        wave = 0.5 * (1.0 + math.cos(math.pi * progress))
        factor = schedule.final + (1.0 - schedule.final) * wave
    elif schedule.name == "step":
        factor = schedule.factor ** ((round_number - 1) // schedule.every)
    if done < schedule.warmup_rounds:
        # Starts above zero: the first step of a run is a step.
        factor *= (done + 1.0 / rounds) / (schedule.warmup_rounds + 1.0 / rounds)
    return factor


def record_losses(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of each record: cross-entropy for classes, squared error for numbers.

    Returns:
        From outputs ``[batch, task.outputs]`` and targets ``[batch]`` to losses ``[batch]``,
        float32.
    """
    if task.data.target.kind == "classes":
        return lambda outputs, targets: functional.cross_entropy(
            outputs.float(), targets, reduction="none"
        )
    return lambda outputs, targets: (outputs.float().squeeze(1) - targets).square()


def train(
    model: nn.Module,
    layout: Layout,
    rows: LocalRows,
    task: Task,
    rule: SiteRule,
    memory: object,
    moment: Moment,
    *,
    devices: list[torch.device],
    private: PrivateTraining | None = None,
    augment: Augment | None = None,
) -> Trained:
    """Train a model on a site's rows for one round, in place.

    Args:
        model: The model, on ``devices[0]``, holding the weights as received.
        layout: Its layout: local and shared tensors are trained, frozen ones are not.
        rows: The site's rows, on ``devices[0]``.
        task: The task.
        rule: The strategy's site half.
        memory: What its ``begin`` returned for this round.
        moment: Where in the run this is; gives the seeds of shuffling and augmentation.
        devices: One device, or several GPUs that share each batch.
        private: Record-level DP; None trains without.
        augment: Random changes of a batch.

    Raises:
        TaskError: Record-level DP over several GPUs, or with bf16.
        RunError: The weights are no longer finite.
    """
    device = devices[0]
    if private is not None:
        check_private(task, len(devices))
    steps = steps_of(task.training, len(rows), private.sampler if private else None)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = [entry.name for entry in layout.of_rule("shared")]
    optimiser = _optimiser(task.training, list(trained.values()))
    losses = record_losses(task)
    rate = task.training.learning_rate
    with (
        numeric_settings(task.numeric, device),
        _drawing(_seed(moment, "layers", private), devices),
        _backward(model, losses, len(rows), task, devices, private) as backward,
    ):
        inputs = arranged(model, rows.inputs, task.numeric)
        augmenting = torch.Generator().manual_seed(_seed(moment, "augment", private))
        for step, picked in enumerate(_batches(rows, task, steps, moment, private)):
            batch = inputs[picked]
            if augment is not None and len(picked):
                batch = augment(batch, augmenting)
            backward(batch, rows.targets[picked])
            _add_term(rule, memory, trained)
            for name in shared:
                parameter = trained[name]
                if parameter.grad is not None:
                    parameter.grad = rule.gradient(memory, name, parameter, parameter.grad)
            if task.training.max_gradient_norm is not None:
                nn.utils.clip_grad_norm_(trained.values(), task.training.max_gradient_norm)
            rate = task.training.learning_rate * learning_rate_factor(
                task.training.schedule, moment.round_number, moment.rounds, step / steps
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    _check_finite(trained, moment)
    return Trained(steps, rate)


def check_private(task: Task, devices: int) -> None:
    """Refuse what record-level DP does not go with.

    Args:
        task: The task.
        devices: Number of devices that one site trains on.

    Raises:
        TaskError: Several GPUs for one site, bf16, or weights that tell the number of rows.
    """
    if task.aggregation.weight != "equal":
        raise TaskError(
            Problem("LF3309", "weights made of row counts are not covered by epsilon",
                    key="task.aggregation.weight", remedy="task.aggregation.weight: equal")
        )  # fmt: skip
    if devices > 1:
        raise TaskError(
            Problem("LF3304", "record-level DP trains a site on one GPU", key="device",
                    remedy="give the site one index")
        )  # fmt: skip
    if task.numeric.precision != "float32":
        raise TaskError(
            Problem("LF3305", "record-level DP needs float32: a norm in bf16 is no bound",
                    key="task.numeric.precision", remedy="task.numeric.precision: float32")
        )  # fmt: skip


def _seed(moment: Moment, purpose: str, private: PrivateTraining | None) -> int:
    """Return a seed: the run's, or the site's own under DP.

    A draw is for a place in a batch. With a known seed, one record more would give every record
    behind it another draw, hence another gradient, and clipping would no longer bound what one
    record changes.
    """
    if private is None:
        return moment.seed_of(purpose)
    return int(private.entropy.words(1)[0] >> 1)


@contextmanager
def _drawing(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Seed torch's global generators, which dropout layers draw from, and put them back after."""
    gpus = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _backward(
    model: nn.Module,
    losses: Callable[[Tensor, Tensor], Tensor],
    rows: int,
    task: Task,
    devices: list[torch.device],
    private: PrivateTraining | None,
) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Yield the function that turns a batch into the gradient of a step."""
    if private is not None:
        with DpSgd(
            model,
            losses,
            clip=private.clip,
            noise=private.noise,
            expected_batch=private.sampler.divisor,
            engine=private.engine,
            most_records=private.most_records,
        ) as engine:
            yield engine.gradient
        return
    called = model_on(model, devices, task.numeric)

    def plain(batch: Tensor, targets: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with autocast(task.numeric, devices[0]):
            outputs = called(batch)
        losses(outputs, targets).mean().backward()  # type: ignore[no-untyped-call]

    yield plain


def _batches(
    rows: LocalRows, task: Task, steps: int, moment: Moment, private: PrivateTraining | None
) -> Iterator[Tensor]:
    """Yield the row numbers of each step: what the site's sampler draws, or shuffled epochs."""
    device = rows.targets.device
    size = task.training.batch_size
    if private is not None:
        for drawn in private.sampler.batches(steps, private.entropy):
            yield torch.from_numpy(drawn).to(device)
        return
    shuffling = torch.Generator().manual_seed(moment.seed_of("shuffle"))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(rows), generator=shuffling)
        picked, order = order[:size], order[size:]
        yield picked.to(device)


def _add_term(rule: SiteRule, memory: object, trained: dict[str, nn.Parameter]) -> None:
    term = rule.loss(memory, trained)
    if term is None:
        return
    parameters = list(trained.values())
    gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _optimiser(training: TrainingSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    if training.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=decay)


def _check_finite(trained: dict[str, nn.Parameter], moment: Moment) -> None:
    broken = [name for name, p in trained.items() if not bool(torch.isfinite(p.detach()).all())]
    if broken:
        raise RunError(
            Problem(
                "LF5101",
                f"training made {broken[0]} infinite or NaN in round {moment.round_number}",
                where=moment.site,
                remedy="a smaller task.training.learning_rate, or task.training.max_gradient_norm",
            )
        )

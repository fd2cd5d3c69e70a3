"""What record-level DP takes at a site: checked and planned before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.accounting import SampledGaussian, noise_multiplier_for
from lepton_fed.privacy.dp.engine import DpSgd, check_model
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import check_private, record_losses, steps_of

__all__ = ["NoisePlan", "check_trainable", "plan_noise"]

_MOST_STEPS = 10_000_000  # beyond it composing the privacy loss takes minutes


@dataclass(frozen=True)
class NoisePlan:
    """How a site's rounds are sampled and noised.

    Args:
        sampler: Draws the batches.
        steps: Steps of one round.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
    """

    sampler: PoissonSampler
    steps: int
    noise_multiplier: float

    @property
    def round_event(self) -> SampledGaussian:
        """Return what one round costs."""
        return self.sampler.event(self.noise_multiplier, self.steps)


def plan_noise(kit: TaskKit, record: RecordPrivacy, rows: int, rounds: int) -> NoisePlan:
    """Turn a target epsilon for a whole run into the noise of each step.

    Args:
        kit: The task's kit.
        record: Target epsilon, delta and clipping norm.
        rows: Rows the site trains on.
        rounds: Rounds of the run; a site is charged as if it took part in all.

    Raises:
        TaskError: Delta is not below 1 / rows, the run has more steps than can be accounted, or no
            noise reaches the target.
    """
    if record.delta >= 1.0 / rows:
        raise TaskError(
            Problem(
                "LF3307",
                f"delta {record.delta:g} is not below 1/{rows}: with {rows} rows it would allow "
                "one of them to be published whole",
                key="privacy.record.delta",
                remedy=f"a delta well below {1.0 / rows:.1g}",
            )
        )
    training = kit.task.training
    sampler = PoissonSampler(rows, training.batch_size)
    steps = steps_of(training, rows, private=True)
    if rounds * steps > _MOST_STEPS:
        raise TaskError(
            Problem(
                "LF3308",
                f"{rounds} rounds of {steps} steps are more than the {_MOST_STEPS:,} that can be "
                "accounted",
                key="rounds.count",
                remedy="fewer rounds, fewer epochs or larger batches",
            )
        )
    noise = noise_multiplier_for(record.epsilon, record.delta, sampler.rate, rounds * steps)
    return NoisePlan(sampler, steps, noise)


def check_trainable(kit: TaskKit, record: RecordPrivacy, devices: int) -> None:
    """Check that a task can be trained with record-level DP, by a step on two made-up records.

    Args:
        kit: The task's kit.
        record: The engine and the clipping norm.
        devices: Number of devices that one site trains on.

    Raises:
        TaskError: The model mixes records or the engine cannot handle a layer of it, or the task's
            precision, weights or devices do not go with DP.
    """
    task, model = kit.task, kit.model
    check_private(task, devices)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, *kit.shape, generator=generator)
    check_model(model, inputs)
    kind = torch.int64 if task.data.target.kind == "classes" else torch.float32
    targets = torch.zeros(2, dtype=kind)
    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            DpSgd(
                model,
                record_losses(task),
                clip=record.clip,
                noise_multiplier=0.0,
                expected_batch=1,
                engine=record.engine,
                entropy=Entropy(bytes(32)),  # draws nothing: no noise, no sampling
            ) as engine,
        ):
            engine.clipped_sum(inputs, targets)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise TaskError(
            Problem(
                "LF3306",
                f"the {record.engine} engine cannot train this model: {error}",
                key="privacy.record.engine",
                remedy="the other engine (hooks or ghost), or a model without that layer",
            )
        ) from error
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)

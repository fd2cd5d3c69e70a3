"""What record-level DP takes at a site: checked and planned before anything is trained."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.data.drawn import drawn_inputs
from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.engine import DpSgd, check_model
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.planning import NoisePlan, fixed_order, plan_for, require_delta
from lepton_fed.privacy.dp.sampling import PoissonSampler, Sampler, sampler_of
from lepton_fed.privacy.dp.shared import SharedNoise
from lepton_fed.privacy.dp.step_noise import IndependentSteps
from lepton_fed.privacy.factorisation.mechanism import FixedOrder
from lepton_fed.strategies.base import PlainSite, SiteRule
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import check_private, record_losses, steps_of

__all__ = ["check_trainable", "plan_noise", "require_memory", "require_plain_site"]

_log = logging.getLogger(__name__)

_PROBES = 3


def plan_noise(
    kit: TaskKit,
    record: RecordPrivacy,
    rows: int,
    rounds: int,
    shared: SharedNoise | None = None,
) -> NoisePlan:
    """Turn a target epsilon for a whole run into the noise of each step.

    Args:
        kit: The task's kit.
        record: Target epsilon, delta, clipping norm and sampler.
        rows: Rows the site trains on.
        rounds: Rounds of the run; a site is charged as if it took part in all.
        shared: The noise that sites share; None when each adds all of it.

    Raises:
        TaskError: Delta is not below 1 / rows, the run has more steps than can be accounted, or no
            noise reaches the target.
        RunError: LF3310, the accountants contradict each other.
    """
    training = kit.task.training
    if shared is not None:
        require_delta(record.delta, rows)
        sampler = PoissonSampler(rows, training.batch_size, shared.sampling_rate)
        return NoisePlan(sampler, 1, shared.noise_multiplier)
    own: Sampler
    if record.is_correlated:
        own = fixed_order(
            rows,
            training.batch_size,
            training.epochs,
            training.steps,
            rounds,
            size=kit.noised_size,
            band=record.band,
        )
    else:
        own = sampler_of(record.sampler, rows, training.batch_size)
    steps = steps_of(training, rows, own)
    return plan_for(own, steps, rounds, epsilon=record.epsilon, delta=record.delta)


def require_memory(plans: Iterable[NoisePlan], size: int) -> int:
    """Return what past noise takes, and refuse more than the machine has memory.

    Args:
        plans: Of all sites on this machine.
        size: Coordinates of a gradient.

    Returns:
        Bytes; 0 where no noise is correlated.

    Raises:
        TaskError: LF3352, it is more.
    """
    samplers = [plan.sampler for plan in plans]
    orders = [sampler for sampler in samplers if isinstance(sampler, FixedOrder)]
    needed = sum(order.past_bytes(size) for order in orders)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise TaskError(
            Problem("LF3352", f"the noise of the steps before takes {needed / 2**30:.1f} GiB, this "
                    f"machine has {memory / 2**30:.1f} GiB of memory", key="privacy.record.band",
                    remedy="a smaller band, a smaller model, or fewer sites on one machine")
        )  # fmt: skip
    return needed


def require_plain_site(agreement: Agreement, rule: SiteRule) -> None:
    """Refuse shared noise with a strategy that does something of its own at the sites.

    What it did would start from gradients that a site's share alone covers.

    Args:
        agreement: What is agreed to.
        rule: The strategy's site half.

    Raises:
        TaskError: LF3330, it does.
    """
    if agreement.privacy.record.is_shared and type(rule) is not PlainSite:
        raise TaskError(
            Problem("LF3330", f"strategy {agreement.strategy.name!r} changes what a site sends, "
                    "and shared noise covers gradients as they are", key="strategy.name",
                    remedy="fedavg, or a server optimiser: flower with FedAvgM, FedAdam, ...")
        )  # fmt: skip


def check_trainable(kit: TaskKit, record: RecordPrivacy, devices: int) -> None:
    """Check that a task can be trained with record-level DP, by steps on made-up records.

    They are taken by a copy of the model with made-up weights. The clipped sum must be the one that
    plain backward passes give, one record at a time: a layer whose per-record gradient is not what
    it seems is found here, and not by what it lets out.

    Args:
        kit: The task's kit.
        record: The clipping norm.
        devices: Number of devices that one site trains on.

    Raises:
        TaskError: The model mixes records or has a layer without per-record gradients, or the
            task's precision, weights or devices do not go with DP.
    """
    check_private(kit.task, devices)
    generator = torch.Generator().manual_seed(0)
    model = _made_up(kit.model, generator)
    inputs = _probes(kit, model, generator)
    check_model(model, inputs)
    losses = record_losses(kit.task)
    kind = torch.int64 if kit.task.data.target.kind == "classes" else torch.float32
    targets = torch.zeros(_PROBES, dtype=kind)
    wanted = _flat(_one_by_one(model, losses, inputs, targets, record.clip))
    try:
        with DpSgd(
            model,
            losses,
            clip=record.clip,
            noise=IndependentSteps(0.0, Entropy(bytes(32))),  # never asked for any
            expected_batch=1,
            engine=record.engine,
        ) as engine:
            if engine.without_rule:
                _log.info(
                    "record-level DP runs these layers twice, for want of a rule: %s",
                    ", ".join(engine.without_rule),
                )
            for _ in range(2):  # a second step finds what the first one left
                found = _flat(engine.clipped_sum(inputs, targets))
                if float((found - wanted).norm()) > 1e-3 * float(wanted.norm()):
                    raise NotImplementedError("its per-record gradients are not what they seem")
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise TaskError(
            Problem(
                "LF3306",
                f"{record.engine} cannot clip this model's gradients record by record: {error}",
                key="task.model",
                remedy="use each parameter only through the layer that holds it",
            )
        ) from error


def _probes(kit: TaskKit, model: nn.Module, generator: torch.Generator) -> Tensor:
    """Return different inputs, ``[_PROBES, *shape]``: any numbers, or what the contract admits.

    A model that looks words up takes whole numbers in a range only.
    """
    inputs = torch.randn(_PROBES, *kit.shape, generator=generator)
    try:
        model(inputs)
    except (IndexError, RuntimeError, ValueError):
        drawn = torch.from_numpy(drawn_inputs(kit.task.data, _PROBES, seed=0))
        with torch.no_grad():
            inputs = kit.preprocessing(drawn)
    return inputs


def _made_up(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with random weights, in training mode but for dropout."""
    other = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    for module in other.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return other


def _one_by_one(
    model: nn.Module,
    losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    clip: float,
) -> list[Tensor]:
    """Return the sum of the records' clipped gradients, by a backward pass for each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    for record in range(len(inputs)):
        part = slice(record, record + 1)
        loss = losses(model(inputs[part]), targets[part]).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(factor * gradient)
    return sums


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])

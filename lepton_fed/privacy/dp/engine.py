"""One step of DP-SGD: clip each record's gradient, sum, add noise.

M. Abadi et al.: Deep Learning with Differential Privacy. CCS 2016. arXiv:1607.00133. The clipped
sum comes from one of several engines; the noise is the site's own entropy, not torch's seedable
generator, and the sum is divided by the public expected batch, never by the number of rows that
happened to be drawn.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.engines.base import EngineName, Loss, trained_parameters
from lepton_fed.privacy.dp.engines.build import build_engine
from lepton_fed.privacy.dp.step_noise import StepNoise

__all__ = ["DpSgd", "check_model"]

_ROUNDING = 1e-4  # of the largest answer: what may differ between two equal records


def check_model(model: nn.Module, probe: Tensor) -> None:
    """Refuse a model whose layers mix records.

    The weights as they are prove little (a gate that starts at zero hides what is behind it), so
    hand in a copy with other ones.

    Args:
        model: The model, in the mode in which it is trained, but for dropout.
        probe: Different made-up inputs, ``[n, ...]`` float32, n from 2, on the model's device.

    Raises:
        TaskError: A layer has no per-record gradient (batch normalisation and its kind), or what
            the model says of one input depends on another.
    """
    found = [
        _mixes(f"{name or 'the model'} ({type(layer).__name__}) {wrong[0]}", wrong[1])
        for name, layer in model.named_modules()
        if (wrong := _wrong(layer)) is not None
    ]
    if found:
        raise TaskError(found)
    watched = probe.clone().requires_grad_(True)
    try:
        answers = model(watched)
        for record, output in enumerate(answers):
            others = torch.arange(len(probe)) != record
            # No gradient: the model takes codes. Then only another record can tell.
            (gradient,) = torch.autograd.grad(
                output.sum(), watched, retain_graph=True, allow_unused=True
            )
            changed = probe.clone()
            changed[record] = probe[record - 1]
            with torch.no_grad():
                moved = (model(changed) - answers)[others].abs().max()
            if (gradient is not None and bool(gradient[others].any())) or not (
                float(moved) <= _ROUNDING * float(answers.detach().abs().max())
            ):
                raise TaskError(_mixes("its output for one record depends on the others'"))
        model(probe[:1])
    except (RuntimeError, ValueError) as error:
        raise TaskError(_mixes(f"it cannot be taken record by record: {error}")) from error


def _wrong(layer: nn.Module) -> tuple[str, str] | None:
    """Return what is wrong with a layer under record-level DP, and what to use; None if nothing."""
    if isinstance(layer, _BatchNorm):
        return "normalises a record by the others of its batch", "use GroupNorm or LayerNorm"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return "keeps statistics of the records", "leave track_running_stats off"
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return "is one kernel, which shows no per-record gradients", "use one of linear layers"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
        return "changes its rows when a record reads them", "leave max_norm out"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.scale_grad_by_freq:
        return "counts words over the whole batch", "leave scale_grad_by_freq out"
    return None


def _mixes(why: str, instead: str = "let each record go through the model by itself") -> Problem:
    return Problem(
        "LF3302",
        f"the model cannot be trained with record-level DP: {why}",
        key="task.model",
        remedy=f"{instead}; task.model.fix: true replaces what has a replacement",
    )


class DpSgd:
    """Turns a batch into a clipped, summed, noised and scaled gradient in ``parameter.grad``.

    Use it as a context manager: an engine hangs hooks on the model, and they must go again.

    Args:
        model: The model, already checked by :func:`check_model`.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
        noise: Adds the noise of each step to the sum.
        expected_batch: Public divisor of the sum.
        engine: What clips and sums.
        most_records: Records that go through the model at once; a larger batch is taken in parts,
            and their sums are added. None sets no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        clip: float,
        noise: StepNoise,
        expected_batch: int,
        engine: EngineName = "hooks",
        most_records: int | None = None,
    ) -> None:
        self._noise = noise
        self._expected_batch = expected_batch
        self._parameters = trained_parameters(model)
        self._engine = build_engine(engine, model, loss, clip)
        self._most_records = most_records

    @property
    def without_rule(self) -> list[str]:
        """Return the names of layers that the engine has no rule for and runs a second time."""
        return self._engine.without_rule

    def __enter__(self) -> Self:
        """Hang the engine's hooks on the model."""
        self._engine.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was found."""
        self._engine.__exit__(kind, error, trace)

    def gradient(self, inputs: Tensor, targets: Tensor) -> None:
        """Set ``grad`` of each trainable parameter to the noised mean gradient.

        Args:
            inputs: ``[batch, ...]``; the batch may be empty, the noise is added all the same.
            targets: ``[batch]``.
        """
        clipped = self.clipped_sum(inputs, targets)
        self._noise.add(clipped)
        for parameter, total in zip(self._parameters, clipped, strict=True):
            parameter.grad = total.div_(self._expected_batch).to(parameter.dtype)

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the records' clipped gradients, a float64 tensor a parameter; no noise.

        What it is rounded to comes after the noise. In float32 a sum of thousands would be rounded
        by more than a small part of what one record may move it.

        A record whose gradient overflows counts as zero: whatever the weights are, one record
        changes the sum by at most ``clip``, and the sum is finite. (Were the sum NaN, the failure
        would tell a coordinator that chose the weights that the record is there.)

        Args:
            inputs: ``[batch, ...]``; none gives zeros.
            targets: ``[batch]``.
        """
        if len(targets) == 0:
            return [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        most = self._most_records or len(targets)
        parts = (
            (inputs[start : start + most], targets[start : start + most])
            for start in range(0, len(targets), most)
        )
        sums = self._engine.clipped_sum(*next(parts))
        for part in parts:
            for total, more in zip(sums, self._engine.clipped_sum(*part), strict=True):
                total.add_(more)
        return sums

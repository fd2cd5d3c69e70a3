"""One step of DP-SGD with Opacus: clip each record's gradient, sum, add noise.

M. Abadi et al.: Deep Learning with Differential Privacy. CCS 2016. arXiv:1607.00133. The per-record
gradients are Opacus'; the noise is the site's own entropy, not torch's seedable generator, and the
sum is divided by the public expected batch, never by the number of rows that happened to be drawn.

Opacus' ghost engine (norms first, a second backward pass) is not offered: its norms are products of
squares in single precision, which a coordinator that chooses the weights can make vanish, so that a
gradient passes unclipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["DpSgd", "add_noise", "check_model"]

Loss = Callable[[Tensor, Tensor], Tensor]

_LEFT_ON_MODULES = ("activations", "max_batch_len")


def check_model(model: nn.Module, probe: Tensor) -> None:
    """Refuse a model whose layers mix records.

    The weights as they are prove little (a gate that starts at zero hides what is behind it), so
    hand in a copy with other ones.

    Args:
        model: The model, in the mode in which it is trained, but for dropout.
        probe: Different made-up inputs, ``[n, ...]`` float32, on the model's device.

    Raises:
        TaskError: A layer has no per-record gradient (batch normalisation and its kind), or what
            the model says of one input depends on another.
    """
    from opacus.validators import ModuleValidator

    found = ModuleValidator.validate(model, strict=False)
    if found:
        raise TaskError([_mixes(_first_sentence(error)) for error in found])
    watched = probe.clone().requires_grad_(True)
    try:
        for record, output in enumerate(model(watched)):
            (gradient,) = torch.autograd.grad(output.sum(), watched, retain_graph=True)
            others = torch.arange(len(probe)) != record
            if bool(gradient[others].any()):
                raise TaskError(_mixes("its output for one record depends on the others'"))
        model(probe[:1])
    except (RuntimeError, ValueError) as error:
        raise TaskError(_mixes(f"it cannot be taken record by record: {error}")) from error


def _mixes(why: str) -> Problem:
    return Problem(
        "LF3302",
        f"the model cannot be trained with record-level DP: {why}",
        key="task.model",
        remedy="use GroupNorm for BatchNorm; Opacus' DP layers for attention and RNNs",
    )


class DpSgd:
    """Turns a batch into a clipped, summed, noised and scaled gradient in ``parameter.grad``.

    Use it as a context manager: Opacus hangs hooks on the model, and they must go again.

    Args:
        model: The model, already checked by :func:`check_model`.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
        noise_multiplier: Standard deviation of the noise over ``clip``.
        expected_batch: Public divisor of the sum.
        entropy: Where the noise comes from.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        clip: float,
        noise_multiplier: float,
        expected_batch: int,
        entropy: Entropy,
    ) -> None:
        self._model = model
        self._loss = loss
        self._clip = clip
        self._noise_multiplier = noise_multiplier
        self._expected_batch = expected_batch
        self._entropy = entropy
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks: Any = None
        self._bare: list[nn.Module] = []

    def __enter__(self) -> DpSgd:
        self._bare = [m for m in self._model.modules() if not hasattr(m, "activations")]
        from opacus.grad_sample import GradSampleHooks

        self._hooks = GradSampleHooks(self._model, loss_reduction="sum")
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.cleanup()
        self._forget()
        for parameter in self._parameters:
            for leftover in ("grad_sample", "_forward_counter"):
                if hasattr(parameter, leftover):
                    delattr(parameter, leftover)

    def gradient(self, inputs: Tensor, targets: Tensor) -> None:
        """Set ``grad`` of each trainable parameter to the noised mean gradient.

        Args:
            inputs: ``[batch, ...]``; the batch may be empty, the noise is added all the same.
            targets: ``[batch]``.
        """
        if len(targets) == 0:
            clipped = [torch.zeros_like(p) for p in self._parameters]
        else:
            clipped = self.clipped_sum(inputs, targets)
        std = self._noise_multiplier * self._clip
        for parameter, total in zip(self._parameters, clipped, strict=True):
            add_noise(total, std, self._entropy)
            parameter.grad = total.div_(self._expected_batch)

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the records' clipped gradients, one tensor a parameter; no noise.

        A record whose gradient overflows counts as zero: whatever the weights are, one record
        changes the sum by at most ``clip``, and the sum is finite. (Were the sum NaN, the failure
        would tell a coordinator that chose the weights that the record is there.)

        Args:
            inputs: ``[batch, ...]``, at least one record.
            targets: ``[batch]``.
        """
        self._forget()
        self._model.zero_grad(set_to_none=True)
        with _quiet_hooks():
            self._loss(self._model(inputs), targets).sum().backward()  # type: ignore[no-untyped-call]
        samples = [self._sample(p, len(targets)) for p in self._parameters]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
        whole = norms.isfinite()
        factors = torch.where(whole, (self._clip / (norms + 1e-6)).clamp(max=1.0), 0.0)
        sums = []
        for sample in samples:
            # Zero times infinity is NaN, so such rows are replaced, not scaled.
            kept = sample if bool(whole.all()) else sample[whole]
            weights = factors if bool(whole.all()) else factors[whole]
            sums.append(torch.einsum("i,i...->...", weights, kept).contiguous())
        return sums

    def _sample(self, parameter: nn.Parameter, batch: int) -> Tensor:
        """Return a parameter's gradient for each record; zeros for one that the loss ignores.

        Raises:
            NotImplementedError: The loss does not ignore it, but Opacus did not see where.
        """
        found = getattr(parameter, "grad_sample", None)
        if found is not None:
            return cast(Tensor, found)
        if parameter.grad is not None:
            raise NotImplementedError("a parameter is used outside the layer that holds it")
        return parameter.new_zeros(batch, *parameter.shape)

    def _forget(self) -> None:
        """Drop what a pass left: one that broke off, or a layer that the loss ignores, leaves much.

        The next pass would take it for its own.
        """
        for module in self._bare:
            for leftover in _LEFT_ON_MODULES:
                if hasattr(module, leftover):
                    delattr(module, leftover)
        for parameter in self._parameters:
            setattr(parameter, "grad_sample", None)  # noqa: B010 - Opacus' attribute, not torch's
            setattr(parameter, "_forward_counter", 0)  # noqa: B010


def add_noise(total: Tensor, std: float, entropy: Entropy) -> None:
    """Add Gaussian noise to a tensor, in place; on the CPU without a copy.

    Args:
        total: float32, of any shape, on any device.
        std: Standard deviation of the noise.
        entropy: Where the noise comes from.
    """
    if total.device.type == "cpu" and total.is_contiguous():
        entropy.add_normal(total.numpy(), std)
        return
    noise = torch.zeros(total.shape, dtype=torch.float32)
    entropy.add_normal(noise.numpy(), std)
    total.add_(noise.to(total.device))


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0]


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    """Silence torch's note that the first layer's hook sees no input gradient: none is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")
        yield

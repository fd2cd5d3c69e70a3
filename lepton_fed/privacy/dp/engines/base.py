"""What every engine of DP-SGD promises, and how norms become factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

__all__ = ["Engine", "EngineName", "Loss", "clip_factors", "quiet_hooks", "trained_parameters"]

Loss = Callable[[Tensor, Tensor], Tensor]
EngineName = Literal["hooks", "ghost", "bookkeeping"]


class Engine(Protocol):
    """Sums the clipped gradients of a batch's records; a context manager that hooks a model.

    Every engine gives the same sum to 1e-5 of what was added.
    """

    @property
    def without_rule(self) -> list[str]:
        """Return the names of layers that the engine has no rule for and runs a second time."""
        ...

    def __enter__(self) -> Self:
        """Hang the engine's hooks on the model."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was found."""
        ...

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the records' clipped gradients, a new float64 tensor a parameter.

        Args:
            inputs: ``[batch, ...]``, at least one record.
            targets: ``[batch]``.

        Raises:
            NotImplementedError: The engine cannot clip this model's gradients record by record.
        """
        ...


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that get a gradient, each once, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """Return by how much each record's gradient is scaled.

    A record whose gradient overflows counts as zero, and so does one so large that its factor is no
    normal float32 number and would be rounded to a larger one: whatever the weights are, a record
    adds at most ``clip``.

    Args:
        norms: ``[batch]`` float64; NaN and infinity mean that the gradient overflowed.
        clip: Euclidean norm to which gradients are clipped.

    Returns:
        ``[batch]`` float64 in [0, 1].

    Example:
        >>> clip_factors(torch.tensor([0.0, 4.0, torch.nan, 1e60], dtype=torch.float64), 2.0)
        tensor([1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    factors = torch.where(norms > clip, clip / norms, 1.0)
    usable = norms.isfinite() & (factors >= torch.finfo(torch.float32).tiny)
    return torch.where(usable, factors, 0.0)


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence torch's note that the first layer's hook sees no input gradient: none is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")
        yield

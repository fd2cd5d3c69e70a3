"""Augmentation: random changes of training images, drawn anew for every batch.

It comes after the preprocessing, so that the padding of ``crop`` is the model's zero and the
``std`` of ``noise`` is in the units the model sees. It is part of training only; an exported model
has none.

======  =========================================================================================
step    what it does to each image, independently of the others
======  =========================================================================================
flip    mirrors it left to right, with ``probability`` (0.5)
crop    pads it with ``padding`` zeros all round and cuts its own size out at a random place
noise   adds Gaussian noise of standard deviation ``std`` to every pixel
======  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lepton_fed.core.settings import Setting
from lepton_fed.core.task import Task
from lepton_fed.data.findings import nearest
from lepton_fed.data.steps import Arguments
from lepton_fed.errors import Problem, TaskError, capped, quoted

__all__ = ["Augmentation", "build_augmentation"]

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def build_augmentation(task: Task) -> Augmentation:
    """Build the random changes of a training batch.

    The result takes a preprocessed batch, float32 ``[n, c, h, w]`` (n may be 0), and a generator,
    and gives a batch of the same shape; the batch it was given stays as it is. Randomness is drawn
    on the generator's device, so one on the CPU gives the same changes to a batch on any device.

    Args:
        task: The task.

    Returns:
        The steps, one after the other; without steps, a function that returns its batch.

    Raises:
        TaskError: A step is unknown or has wrong arguments, or the task has no images; all problems
            are listed.
    """
    problems: list[Problem] = []
    steps: list[Augmentation] = []
    if task.augmentation and task.data.kind != "image":
        raise TaskError(
            Problem(
                "LF3109",
                "augmentation is for images; this task has tables",
                key="task.augmentation",
                remedy="take it out",
            )
        )
    smallest = min(task.data.example_shape[1:], default=1)
    for position, step in enumerate(task.augmentation):
        key = f"task.augmentation[{position}]"
        arguments = Arguments(step.arguments, f"{key}.arguments", problems)
        if step.step in _STEPS:
            steps.append(_STEPS[step.step](arguments, smallest))
            arguments.close()
            continue
        problems.append(
            Problem(
                "LF3101",
                f"there is no step {quoted(step.step)}",
                key=f"{key}.step",
                remedy=nearest(step.step, _STEPS),
            )
        )
    if problems:
        raise TaskError(capped(problems, "LF3149"))

    def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for step in steps:
            batch = step(batch, generator)
        return batch

    return augment


def _flip(arguments: Arguments, smallest: int) -> Augmentation:
    bounds = Setting("Probability that an image is mirrored.", at_least=0, at_most=1)
    probability = arguments.number("probability", bounds, 0.5)

    def flip(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        draws = torch.rand(len(batch), generator=generator, device=generator.device)
        mirrored = (draws < probability).to(batch.device)
        return torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)

    return flip


def _crop(arguments: Arguments, smallest: int) -> Augmentation:
    # With less padding than the image is wide, no cut can miss the image altogether.
    bounds = Setting("Zeros on each side, in pixels.", at_least=1, below=smallest)
    padding = arguments.whole("padding", bounds)

    def crop(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = batch.shape
        corners = torch.randint(
            2 * padding + 1, (2, count), generator=generator, device=generator.device
        ).to(batch.device)
        rows = corners[0][:, None] + torch.arange(height, device=batch.device)
        columns = corners[1][:, None] + torch.arange(width, device=batch.device)
        examples = torch.arange(count, device=batch.device)
        padded = nn.functional.pad(batch, (padding,) * 4)
        # The slice between the index tensors puts the channels last: [n, h, w, c].
        cut = padded[examples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2).contiguous()

    return crop


def _noise(arguments: Arguments, smallest: int) -> Augmentation:
    std = arguments.number("std", Setting("Standard deviation of the noise.", above=0))

    def noise(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        draws = torch.randn(batch.shape, generator=generator, device=generator.device)
        return batch + std * draws.to(batch.device)

    return noise


_STEPS: dict[str, Callable[[Arguments, int], Augmentation]] = {
    "flip": _flip,
    "crop": _crop,
    "noise": _noise,
}

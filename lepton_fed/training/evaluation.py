"""Evaluation on a site's held-out rows: counts, not ratios."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.core.metrics import CountsSum, MetricsPlan
from lepton_fed.core.task import Task
from lepton_fed.training.local import LocalRows
from lepton_fed.training.numeric import arranged, autocast, numeric_settings

__all__ = ["evaluate"]

_BATCH = 1024  # fixed: the batch size changes the last bits of the outputs


def evaluate(
    model: nn.Module, rows: LocalRows, task: Task, plan: MetricsPlan, device: torch.device
) -> npt.NDArray[np.float64]:
    """Count how the model does on rows.

    Args:
        model: The model, on ``device``; its mode is put back.
        rows: Preprocessed rows, on ``device``; none gives zero counts.
        task: The task: numeric settings and kind of target.
        plan: What is counted.
        device: Where the model is.

    Returns:
        ``[plan.size]`` float64.
    """
    total = CountsSum(plan.size)
    was_training = model.training
    model.eval()
    try:
        with numeric_settings(task.numeric, device), torch.no_grad():
            inputs = arranged(model, rows.inputs, task.numeric)
            for start in range(0, len(rows), _BATCH):
                part = slice(start, start + _BATCH)
                with autocast(task.numeric, device):
                    outputs = model(inputs[part])
                truth = rows.targets[part].cpu().numpy()
                total.add(plan.measure(outputs.float().cpu().numpy(), truth))
    finally:
        model.train(was_training)
    return total.total()

"""Which device a site trains on, in words of the conf: cpu, cuda, cuda:1, cuda:0,1."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from lepton_fed.core.task import Numeric
from lepton_fed.errors import ConfError, Problem
from lepton_fed.training.numeric import autocast

__all__ = ["devices_of", "model_on"]


def devices_of(words: str) -> list[torch.device]:
    """Return the devices that a conf's ``device`` names.

    Args:
        words: ``cpu``, ``cuda`` (the first GPU), ``cuda:1``, or several by index: ``cuda:0,1``.

    Raises:
        ConfError: The words are none of these, or a GPU is not there.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+(?:,\d+)*))?", words)
    if match is None:
        raise ConfError(
            Problem(
                "LF1101", f"device {words!r} is none of cpu, cuda, cuda:1, cuda:0,1", key="device"
            )
        )
    if words == "cpu":
        return [torch.device("cpu")]
    indices = [int(index) for index in (match[1] or "0").split(",")]
    there = torch.cuda.device_count()
    missing = [index for index in indices if index >= there]
    if missing:
        raise ConfError(
            Problem(
                "LF1102",
                f"device {words!r} wants GPU {missing[0]}; torch sees {there} of them",
                key="device",
                remedy="device: cpu, or install a CUDA build of torch and the NVIDIA driver",
            )
        )
    return [torch.device("cuda", index) for index in indices]


def model_on(model: nn.Module, devices: list[torch.device], numeric: Numeric) -> nn.Module:
    """Return the model as it is called in a step: split over several GPUs by batch, or as it is.

    Args:
        model: The model, already on ``devices[0]``.
        devices: One device, or several GPUs.
        numeric: The task's settings.
    """
    if len(devices) == 1:
        return model
    return nn.DataParallel(_Cast(model, numeric, devices[0]), [device.index for device in devices])


class _Cast(nn.Module):
    """A model that sets its own autocast: DataParallel calls it in threads that know of none."""

    def __init__(self, model: nn.Module, numeric: Numeric, device: torch.device) -> None:
        super().__init__()
        self._model = model
        self._numeric = numeric
        self._device = device

    def forward(self, inputs: Tensor) -> Tensor:
        with autocast(self._numeric, self._device):
            outputs: Tensor = self._model(inputs)
        return outputs

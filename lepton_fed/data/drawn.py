"""Rows drawn from a data contract, where there are no real ones: at a coordinator."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_fed.core.seeds import generator
from lepton_fed.core.task import Column, DataContract, Task

__all__ = ["drawn_inputs", "pixel_range"]

_PIXELS = 256


def drawn_inputs(
    contract: DataContract, rows: int, seed: int, pixel_range: float = 1.0
) -> npt.NDArray[np.generic]:
    """Return inputs that fit a contract and are nobody's.

    Numbers of a column are normal with the contract's mean and standard deviation, within its
    bounds; categories and pixels are uniform.

    Args:
        contract: What a row looks like.
        rows: How many, from 1.
        seed: The same seed draws the same rows.
        pixel_range: Largest value of a float32 pixel.

    Returns:
        ``[rows, *example shape]`` in the contract's dtype.
    """
    draw = generator(seed, "drawn-inputs")
    shape = (rows, *contract.example_shape)
    if contract.kind == "table":
        columns = [_column(column, rows, draw) for column in contract.columns]
        return np.stack(columns, axis=1).astype(np.float32)
    if contract.dtype == "uint8":
        return draw.integers(0, _PIXELS, shape, dtype=np.uint8)
    return (pixel_range * draw.random(shape)).astype(np.float32)


def pixel_range(task: Task) -> float:
    """Return what `scale` divides pixels by: they are likely to reach up to it.

    Args:
        task: Its preprocessing says.
    """
    factors = [
        step.arguments["by"]
        for step in task.preprocessing
        if step.step == "scale" and "by" in step.arguments
    ]
    return float(factors[0]) if factors else 1.0


def _column(column: Column, rows: int, draw: np.random.Generator) -> npt.NDArray[np.floating]:
    if column.kind == "category":
        return draw.integers(0, len(column.values), rows).astype(np.float64)
    numbers = draw.normal(column.mean, column.std, rows)
    return np.clip(numbers, column.minimum, column.maximum)

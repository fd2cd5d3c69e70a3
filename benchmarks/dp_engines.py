"""What DP-SGD costs over plain SGD, by engine: time of a step and peak memory.

Run it as `python -m benchmarks.dp_engines`.

A step is loss, clipped sum, noise and optimiser. It is timed in turn with a step of plain SGD in
the same process, in CPU time of one thread. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import in_turn
from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.engines.base import EngineName
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import IndependentSteps

ENGINES: dict[str, EngineName | None] = {
    "plain": None,
    "hooks": "hooks",
    "ghost": "ghost",
    "bookkeeping": "bookkeeping",
}
MODELS = ("small", "fedavg")
BATCHES = (32, 256)
MEMORY_STEPS = 4
REPEATS = 9


def small() -> nn.Module:
    """Return the CNN of DP tutorials, 26,010 parameters (N. Papernot et al., AAAI 2021)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(),
        nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def fedavg() -> nn.Module:
    """Return the CNN of FedAvg, 1,663,370 parameters (B. McMahan et al., AISTATS 2017)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each record."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def step_of(engine: str, model: nn.Module, batch: int) -> Callable[[], None]:
    """Return a function that takes one step."""
    inputs = torch.randn(batch, 1, 28, 28)
    targets = torch.randint(10, (batch,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    private = None
    name = ENGINES[engine]
    if name is not None:
        private = DpSgd(
            model, losses, clip=1.0, noise=IndependentSteps(1.0, Entropy.from_system()),
            expected_batch=batch, engine=name,
        ).__enter__()  # fmt: skip

    def step() -> None:
        if private is None:
            optimiser.zero_grad()
            losses(model(inputs), targets).mean().backward()  # type: ignore[no-untyped-call]
        else:
            private.gradient(inputs, targets)
        optimiser.step()

    return step


def cell(what: str, name: str, batch: int, engine: str) -> object:
    """Measure one cell; it has a process of its own.

    Returns:
        Peak memory in MiB, or seconds of engine and plain and the range of their ratio.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kinds = {engine, "plain"} if what == "time" else {engine}
    steps = {kind: step_of(kind, globals()[name](), batch) for kind in kinds}
    if what == "time":
        return in_turn(steps[engine], steps["plain"], REPEATS, clock=time.process_time)
    for _ in range(MEMORY_STEPS):
        steps[engine]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a table: ratio to plain SGD, and peak memory."""
    print("CPU time of one thread; ratio engine / plain SGD, median (smallest to largest)")
    print(f"{'model':<8} {'batch':>5}  {'engine':<12} {'step s':>8} {'ratio':>22} {'MiB':>7}")
    for name in MODELS:
        for batch in BATCHES:
            for engine in ENGINES:
                measure = functools.partial(_child, name=name, batch=batch, engine=engine)
                seconds, _, (low, middle, high) = measure("time")
                print(
                    f"{name:<8} {batch:>5}  {engine:<12} {seconds:>8.4f} "
                    f"{middle:>8.2f} ({low:.2f} to {high:.2f}) {measure('memory'):>7.0f}",
                    flush=True,
                )


def _child(what: str, *, name: str, batch: int, engine: str) -> Any:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_engines"]
    words += [what, name, str(batch), engine]
    ran = subprocess.run(words, check=True, capture_output=True, text=True)  # noqa: S603
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(cell(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        main()

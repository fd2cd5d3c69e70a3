"""What the framework costs: a simulated run against a plain loop over the same sites.

The floor trains the same model on the same rows with the same steps and averages; it has no
admission, events, checkpoints or Flower.

Run it as `python -m benchmarks.simulation`.
"""

from __future__ import annotations

import copy
import functools
import tempfile

import numpy as np
import torch
from torch.nn import functional

from benchmarks.timing import in_turn
from lepton_fed.config.load import Loaded, load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.simulations.population import populate
from lepton_fed.simulations.sequential import simulate
from lepton_fed.training.kit import build_kit

ROUNDS = 10
MODELS = ("linear", "mlp", "cnn")


def load(model: str, runs: str, *overrides: str) -> Loaded[SimulationConf]:
    """Return the demo's conf without DP and evaluation, with another model."""
    values = template("simulation")
    values["task"]["model"] = {"name": model}
    settings = ("privacy.record.enabled=false", "rounds.evaluate=false", f"rounds.count={ROUNDS}")
    return load_values(SimulationConf, values, [*settings, f"runs={runs}", *overrides])


def plain(conf: SimulationConf) -> np.ndarray:
    """Train as a research script would and return the final model."""
    kit = build_kit(conf.task, conf.seed)
    cpu = torch.device("cpu")
    torch.set_num_threads(conf.task.numeric.threads)
    sites = [kit.prepare(rows.training, cpu) for rows in populate(conf)]
    settings = conf.task.training
    generator = torch.Generator().manual_seed(conf.seed)
    model = kit.model
    for _ in range(conf.rounds.count):
        start = copy.deepcopy(model.state_dict())
        totals = {name: torch.zeros_like(value) for name, value in start.items()}
        for rows in sites:
            model.load_state_dict(start)
            optimiser = torch.optim.SGD(
                model.parameters(), lr=settings.learning_rate, momentum=settings.momentum
            )
            for _ in range(settings.epochs or 1):
                order = torch.randperm(len(rows), generator=generator)
                for picked in torch.split(order, settings.batch_size):
                    optimiser.zero_grad()
                    loss = functional.cross_entropy(
                        model(rows.inputs[picked]), rows.targets[picked]
                    )
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
            for name, value in model.state_dict().items():
                totals[name] += value / len(sites)
        model.load_state_dict(totals)
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def main() -> None:
    """Print a table: seconds of a run, and the ratio."""
    print(f"digits, 3 sites, {ROUNDS} rounds; ratio lepton-fed / plain loop, median (range)")
    print(f"{'model':>8} {'run s':>8} {'loop s':>8} {'ratio':>20}")
    with tempfile.TemporaryDirectory() as runs:
        for model in MODELS:
            loaded = load(model, runs)
            ours, floor, (low, middle, high) = in_turn(
                functools.partial(simulate, loaded),
                functools.partial(plain, loaded.conf),
                repeats=5,
            )
            print(f"{model:>8} {ours:>8.3f} {floor:>8.3f} {middle:>8.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()

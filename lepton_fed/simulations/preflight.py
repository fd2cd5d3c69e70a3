"""What `lepton-fed check` looks at for a simulation."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_fed.config.schema import RecordPrivacy, SimulationConf
from lepton_fed.runs.checks import Checklist
from lepton_fed.server.preflight import check_strategy, check_sums, check_task
from lepton_fed.simulations.population import SiteRows, populate
from lepton_fed.simulations.sequential import plan_privacy
from lepton_fed.training.device import devices_of

__all__ = ["check_simulation"]


def check_simulation(conf: SimulationConf) -> Checklist:
    """Check a simulation's conf, its data, its model, and what its privacy takes.

    Args:
        conf: The conf.
    """
    checks = Checklist()
    kit = check_task(checks, conf.task, conf.seed)
    strategy = check_strategy(checks, conf.strategy)
    checks.add(
        "device", lambda: devices_of(conf.device), lambda devices: ", ".join(map(str, devices))
    )
    population = checks.add("data", lambda: populate(conf), _describe_rows)
    if kit is not None and population is not None and conf.privacy.record.enabled:
        checks.add(
            "privacy",
            lambda: plan_privacy(conf, kit, population),
            lambda noise: _describe_noise(noise, conf.privacy.record),
        )
    if kit is not None and strategy is not None and population is not None:
        check_sums(checks, conf, kit, strategy, lambda: len(population))
    return checks


def _describe_rows(population: Sequence[SiteRows]) -> str:
    counts = [len(rows.training) for rows in population]
    held_out = sum(len(rows.held_out) for rows in population)
    return (
        f"{sum(counts)} rows over {len(counts)} sites ({min(counts)} to {max(counts)} a site), "
        f"{held_out} held out"
    )


def _describe_noise(noise: dict[str, float], record: RecordPrivacy) -> str:
    text = f"noise multiplier {min(noise.values()):.2f} to {max(noise.values()):.2f}"
    if record.is_correlated:
        text += f", correlated over steps, {record.sampler} order"
    elif record.sampler != "poisson":
        text += f", {record.sampler} order without amplification"
    return text if record.randomness == "system" else f"{text}; INSECURE: noise from the seed"

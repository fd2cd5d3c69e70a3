"""A federation to measure, and what its coordinator measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.core.layout import Layout, TensorEntry

__all__ = ["Measured", "Setting"]


@dataclass(frozen=True)
class Setting:
    """One federation to measure.

    Args:
        folder: Holds keys and state.
        port: Port of the coordinator.
        sites: How many there are.
        floats: Size of the model.
        rounds: How many are done.
        database: SQLite in the state folder, or nothing on disk.
        turns: Address of who says when a round begins; empty lets one follow the other.
        masked: Whether updates are securely aggregated.
    """

    folder: str
    port: int
    sites: int
    floats: int
    rounds: int
    database: bool = True
    turns: str = ""
    masked: bool = False

    @property
    def names(self) -> list[str]:
        """Return the names of the sites."""
        return [f"site-{number:02d}" for number in range(self.sites)]

    @property
    def layout(self) -> Layout:
        """Return the layout of the model: one tensor."""
        return Layout((TensorEntry("weight", (self.floats,), "float32", "shared", 0),))

    @property
    def agreement(self) -> Agreement:
        """Return what the sites agreed to before the benchmark began."""
        words = [
            "privacy.record.enabled=false",
            f"privacy.secure_aggregation.enabled={str(self.masked).lower()}",
        ]
        conf = load_values(SimulationConf, template("simulation"), words).conf
        return Agreement(
            "benchmark", conf.task, conf.strategy, self.rounds, conf.seed, conf.privacy, self.sites
        )

    def key(self, name: str) -> Path:
        """Return the path of a key."""
        return Path(self.folder) / "keys" / name


@dataclass
class Measured:
    """What a coordinator measured of itself.

    Args:
        rounds_s: Seconds from the end of a round to the end of the next.
        idle: Share of a core in use while nothing is asked.
        peak_kib: Largest resident memory.
        resident_kib: Resident memory after each round.
        files: Open files after each round.
        database_bytes: Size of the database on disk after each round.
        refused: Replies that were refused, which should be none.
    """

    rounds_s: list[float] = field(default_factory=list)
    idle: float = 0.0
    peak_kib: int = 0
    resident_kib: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    database_bytes: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

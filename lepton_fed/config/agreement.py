"""What a site agrees to before a run, and the coordinator is held to in every ask."""

from __future__ import annotations

from dataclasses import dataclass

from lepton_fed.config.schema import Privacy, StrategyConf
from lepton_fed.core.digests import digest_of
from lepton_fed.core.task import Task

__all__ = ["Agreement"]


@dataclass(frozen=True)
class Agreement:
    """Everything that decides what a site does in a run; one digest of it is in every ask.

    Args:
        run: Name of the run.
        task: What is learned.
        strategy: Whose site half is run.
        rounds: Rounds of the run.
        seed: Seed of the run.
        privacy: What is protected.
        cohort: Most sites that a round takes; it says how fine a masked number can be.
        noise_multiplier: With shared noise, its standard deviation over what one record moves: all
            have to go by the same number, to the last bit, and sites hold it against epsilon.
        client_noise: With client-level DP, its noise multiplier: standard deviation of the noise
            that is counted on over the norm of an update; agreed on and checked in the same way.
    """

    run: str
    task: Task
    strategy: StrategyConf
    rounds: int
    seed: int
    privacy: Privacy
    cohort: int = 0
    noise_multiplier: float = 0.0
    client_noise: float = 0.0

    @property
    def digest(self) -> str:
        """Return the canonical SHA-256 digest, 64 hexadecimal digits."""
        return digest_of("lepton-fed agreement 5", self)

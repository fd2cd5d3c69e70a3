"""What a site remembers of secure aggregation over a restart: plain data, one file."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Coming", "State"]


@dataclass
class Coming:
    """The attempt that a site has given an advert for; the one that is going on stays meanwhile.

    Args:
        round_number: Its round; 0 for none.
        attempt: The attempt at it.
        secrets: Its three secrets, hexadecimal.
    """

    round_number: int = 0
    attempt: int = 0
    secrets: list[str] = field(default_factory=list)


@dataclass
class State:
    """What a site remembers of a run's secure aggregation; synced before each answer leaves.

    Args:
        coming: The attempt that it has given an advert for.
        closed: Last round whose shares it has revealed.
        round_number: The round that is going on; 0 before the first.
        attempt: The attempt at it.
        first: Names of the first cohort of that round.
        first_threshold: Its threshold.
        secrets: The three secrets of the attempt, hexadecimal; empty once they are wiped.
        threshold: The attempt's threshold.
        subject: Digest of what the site was asked in it.
        adverts: The adverts of its cohort.
        envelopes: What this site made for the holders of its secrets, itself among them.
        asked: Digest of what was asked, by phase.
        senders: Whose envelopes came, sorted.
        wrapped: Wrapped pair secret of each other sender whose envelope came, by name.
        seed_shares: Share of the seed of each sender that this site holds one of, by name,
            hexadecimal.
        mask_shares: Share of the mask secret of each other sender that it holds one of, by name,
            hexadecimal.
        survivors: Whose vectors the site confirmed to be in the sum, sorted.
        signed: Whose signatures over them it has seen when it revealed its shares, sorted.
    """

    coming: Coming = field(default_factory=Coming)
    closed: int = 0
    round_number: int = 0
    attempt: int = 0
    first: list[str] = field(default_factory=list)
    first_threshold: int = 0
    secrets: list[str] = field(default_factory=list)
    threshold: int = 0
    subject: str = ""
    adverts: list[dict[str, str]] = field(default_factory=list)
    envelopes: list[dict[str, str]] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)
    senders: list[str] = field(default_factory=list)
    wrapped: dict[str, str] = field(default_factory=dict)
    seed_shares: dict[str, str] = field(default_factory=dict)
    mask_shares: dict[str, str] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)
    signed: list[str] = field(default_factory=list)

"""Which sites take part in a round: drawn from the run's seed, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_fed.core.seeds import generator

__all__ = ["select_cohort"]


def select_cohort(sites: Sequence[str], size: int, seed: int, round_number: int) -> tuple[str, ...]:
    """Draw a round's cohort.

    Args:
        sites: Names of all sites, in any order.
        size: How many are selected, at most as many as there are.
        seed: Seed of the run.
        round_number: Round, from 1.

    Returns:
        Names, sorted.
    """
    names = sorted(sites)
    if size == len(names):
        return tuple(names)
    picked = generator(seed, "select", round_number=round_number).choice(
        len(names), size=size, replace=False
    )
    return tuple(names[index] for index in sorted(picked))

"""Which fault happens when: a pure function of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from tests.faults.running import MASKED_SITES, PHASES

__all__ = ["KINDS", "PHASED", "Kind", "Planned", "schedule"]

Kind = Literal[
    "coordinator killed",
    "service killed",
    "SuperNode killed",
    "trainer killed",
    "trainer stopped",
    "site stopped",
    "line silent",
    "line refusing",
    "disk full",
]

KINDS: tuple[Kind, ...] = get_args(Kind)
PHASED: tuple[Kind, ...] = ("coordinator killed", "service killed", "SuperNode killed")
"""Faults that happen as a phase of a masked round begins, or at any time."""

_QUIET_FIRST, _QUIET_LAST = 6, 40  # rounds; at the end a fifth of a short run
_GAP = (3, 6)
_LINED = ("north", "south")  # the sites whose line can be cut
_LASTING_S: dict[Kind, tuple[float, float]] = {
    "coordinator killed": (1, 8),
    "trainer stopped": (2, 24),  # some of them longer than the others wait
    "site stopped": (4, 30),
    "line silent": (3, 25),
    "line refusing": (3, 25),
    "disk full": (4, 12),
}


@dataclass(frozen=True)
class Planned:
    """A fault to come.

    Args:
        after_round: It happens once this round is closed.
        kind: What happens.
        site: Where; empty for the coordinator.
        lasting_s: Seconds after which it is taken back, or the coordinator is started again; 0 for
            what is over as it happens.
        phase: It happens as this phase of a masked round begins; at any time when empty.
    """

    after_round: int
    kind: Kind
    site: str
    lasting_s: float
    phase: str = ""


def schedule(seed: int, rounds: int) -> tuple[Planned, ...]:
    """Return the faults of a run.

    Every kind comes before any comes again. The last rounds are left alone, so that the test can
    ask that all sites are back.

    Args:
        seed: Decides everything.
        rounds: Rounds of the run.
    """
    draw = random.Random(seed)  # noqa: S311 - nothing is secret here
    planned: list[Planned] = []
    bag: list[Kind] = []
    after = _QUIET_FIRST
    while after <= rounds - min(_QUIET_LAST, rounds // 5):
        if not bag:
            bag = list(KINDS)
            draw.shuffle(bag)
        kind = bag.pop()
        site = draw.choice(_LINED if kind.startswith("line") else MASKED_SITES)
        lasting_s = draw.uniform(*_LASTING_S.get(kind, (0, 0)))
        where = "" if kind == "coordinator killed" else site
        phase = draw.choice(("", *PHASES)) if kind in PHASED else ""
        planned.append(Planned(after, kind, where, round(lasting_s, 1), phase))
        after += draw.randint(*_GAP)
    return tuple(planned)

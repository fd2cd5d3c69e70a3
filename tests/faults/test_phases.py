"""Sites are lost between two phases of a masked round: the sum is of those who stayed, or none."""

from __future__ import annotations

import signal
from contextlib import suppress

from tests.faults.rows import Fault, fault
from tests.faults.running import PHASES, Event, Mark, Running

SOUTH = "south"
THREE = ("north", "east", "south")
Rows = tuple[Fault, ...]


def closed(running: Running, mark: Mark, number: int) -> Event:
    """Wait until a round is over and return its end."""
    return running.happened(mark, "round.closed", 90, round=number)


@fault(
    name="a site's service is killed between two phases of a masked round",
    where="site",
    sees="coordinator: `reply.refused` LF5303, and the site among the `dropped` of "
    "`secagg.opened` when it had handed out shares; the round's sum is of the others, or of all "
    "when its masked vector was there",
    lost="its contribution to that round, or nothing when its masked vector was there",
    normal_s=60,
)
def test_the_sum_is_of_those_whose_masked_vectors_came(running: Running, rows: Rows) -> None:
    for phase in PHASES:
        running.whole()
        mark = running.mark()
        number = running.asked_for(phase)
        running.signal(SOUTH, signal.SIGKILL, "supervisor")
        end = closed(running, mark, number)
        (opened,) = running.since(mark, "secagg.opened", round=number)
        others = set(running.sites) - {SOUTH}
        assert others <= set(opened["sites"]), "nobody else is lost with it"
        assert end["sites"] == opened["sites"]
        if phase in ("confirm", "reveal"):
            assert SOUTH in opened["sites"], "its masked vector was there"
        running.normal((SOUTH, rows[0]))
        running.others_go_on(mark, SOUTH)
    for site in running.sites:
        running.records_hold(site)


@fault(
    name="so many sites are lost in a masked round that too few are left",
    where="site",
    sees="coordinator: `secagg.abandoned` with the phase and how many are left, "
    "`round.below_quorum`; the sites that stayed reveal nothing",
    lost="the round, for everybody; nothing is revealed of any update",
    normal_s=90,
)
def test_a_round_with_too_few_is_abandoned_and_nothing_is_revealed(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    number = running.asked_for("share")
    for site in THREE:
        with suppress(ProcessLookupError):
            running.signal(site, signal.SIGKILL, "supernode")
    end = closed(running, mark, number)
    assert end["sites"] == []
    running.happened(mark, "secagg.abandoned", round=number)
    assert not running.since(mark, "secagg.opened", round=number)
    for site in set(running.sites) - set(THREE):
        kept = running.records(site).masked().get((end["run"], number))
        assert kept is None or not kept.phases["reveal"]
    running.normal(*((site, rows[0]) for site in running.sites))
    for site in running.sites:
        running.records_hold(site)

"""The coordinator goes away and comes back: sites find it again without a restart of theirs."""

from __future__ import annotations

import shutil
import time

from tests.e2e.federation import SITES
from tests.faults.rows import Fault, fault
from tests.faults.running import Running

AWAY_S = 20.0
Rows = tuple[Fault, ...]


def restarts(running: Running, *, forget: bool = False, away_s: float = AWAY_S) -> None:
    """Kill the coordinator and start it again after a while, perhaps without its memory."""
    running.kill("coordinator")
    time.sleep(away_s)
    if forget:
        shutil.rmtree(running.root / "state" / "coordinator")
    running.start("coordinator")


@fault(
    name="the coordinator is killed and started again: its sites",
    where="coordinator",
    sees="sites: `connection.failed the coordinator cannot be reached`, later `connection.up`",
    lost="the round in progress",
    normal_s=60,
)
def test_sites_find_a_coordinator_that_was_killed_again(running: Running, rows: Rows) -> None:
    mark = running.mark()
    pids = {site: running.pid(site, "supervisor") for site in SITES}
    restarts(running)
    running.normal(*((site, rows[0]) for site in SITES))
    for site in SITES:
        running.told(mark, site, "connection.failed the coordinator cannot be reached")
        running.told(mark, site, "connection.up")
        assert running.pid(site, "supervisor") == pids[site]
        running.records_hold(site)


@fault(
    name="the coordinator is set up anew, on an empty state folder: its sites",
    where="coordinator",
    sees="sites: `connection.refused ... it was set up anew`, `connection.ended status=0`, "
    "`connection.up`",
    lost="the round in progress",
    normal_s=60,
)
def test_sites_find_a_coordinator_without_memory_again(running: Running, rows: Rows) -> None:
    mark = running.mark()
    restarts(running, forget=True, away_s=3)
    running.normal(*((site, rows[0]) for site in SITES))
    for site in SITES:
        running.told(mark, site, "connection.ended status=0")
        running.told(mark, site, "connection.up")
        running.records_hold(site)


@fault(
    name="a site is started before its coordinator",
    where="coordinator",
    sees="site: `connection.failed the coordinator cannot be reached: ... Connection refused`, "
    "later `connection.up`",
    lost="nothing",
    normal_s=60,
)
def test_a_site_that_is_there_first_waits_for_its_coordinator(running: Running, rows: Rows) -> None:
    running.kill("coordinator")
    mark = running.mark()
    for site in SITES:
        running.stop_site(site)
        running.start_site(site)
        running.told(mark, site, "connection.failed the coordinator cannot be reached")
    running.start("coordinator")
    running.normal(*((site, rows[0]) for site in SITES))
    for site in SITES:
        running.told(mark, site, "connection.up")
        running.records_hold(site)

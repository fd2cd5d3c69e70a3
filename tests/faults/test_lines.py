"""The line between a site and the coordinator is cut, in two ways, and heals."""

from __future__ import annotations

import time

from tests.faults.rows import Fault, fault
from tests.faults.running import Running

SOUTH, NORTH = "south", "north"
SHORT_S = 3.0
Rows = tuple[Fault, ...]


@fault(
    name="the line is cut, and nothing says so (cable, firewall)",
    where="network",
    sees="site: `connection.failed`, later `connection.up`; coordinator: `reply.refused` LF5303",
    lost="its contribution to one or two rounds",
    normal_s=40,
)
@fault(
    name="the line is cut, and connections are refused (router, proxy)",
    where="network",
    sees="site: `connection.failed`, later `connection.up`; coordinator: `reply.refused` LF5303",
    lost="its contribution to one or two rounds",
    normal_s=25,
)
def test_sites_are_back_when_their_lines_heal(running: Running, rows: Rows) -> None:
    mark = running.mark()
    running.lines[SOUTH].cut("silent")
    running.lines[NORTH].cut("refusing")
    for site in (SOUTH, NORTH):
        running.told(mark, site, "connection.failed")
        running.happened(mark, "reply.refused", site=site, code="LF5303")
        running.lines[site].heal()
    running.normal((SOUTH, rows[0]), (NORTH, rows[1]))
    for site in (SOUTH, NORTH):
        running.told(mark, site, "connection.up")
    running.survived(mark, south=2, north=2)


@fault(
    name="the line is cut for a few seconds",
    where="network",
    sees="nothing, or `connection.failed` and `connection.up`",
    lost="nothing, or its contribution to one round, when the ask was on its way just then",
    normal_s=30,
)
def test_a_short_cut_costs_one_round_at_most(running: Running, rows: Rows) -> None:
    mark = running.mark()
    supernode = running.pid(SOUTH, "supernode")
    running.lines[SOUTH].cut("refusing")
    time.sleep(SHORT_S)
    running.lines[SOUTH].heal()
    running.normal((SOUTH, rows[0]))
    assert running.pid(SOUTH, "supernode") == supernode, "the connection was kept up"
    running.survived(mark, south=1)

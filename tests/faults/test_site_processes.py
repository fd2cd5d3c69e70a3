"""A site's processes are killed, ended, stopped: the site comes back by itself."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.faults.rows import Fault, fault
from tests.faults.running import Running

NORTH, EAST, SOUTH = "north", "east", "south"
Rows = tuple[Fault, ...]


@fault(
    name="the SuperNode is killed (`kill -9`, out of memory)",
    where="site",
    sees="site: `connection.ended status=-9`, `connection.refused` until the coordinator lets it "
    "in again, `connection.up`; coordinator: `reply.refused` LF5303",
    lost="its contribution to one round",
    normal_s=40,
    rounds=("masked", "plain"),
)
@fault(
    name="the site's service is killed (`kill -9`); worker and supervisor are one process",
    where="site",
    sees="site: `site.started`, `connection.up`, after the service manager's restart; coordinator: "
    "`reply.refused` LF5303",
    lost="its contribution to one round",
    normal_s=45,
    rounds=("masked", "plain"),
)
def test_a_killed_supernode_and_a_killed_service_come_back(running: Running, rows: Rows) -> None:
    mark = running.mark()
    before = running.pids(SOUTH)
    running.signal(NORTH, signal.SIGKILL, "supernode")
    running.signal(SOUTH, signal.SIGKILL, "supervisor")
    running.normal((NORTH, rows[0]), (SOUTH, rows[1]))
    for words in ("connection.ended status=-9", "connection.refused", "connection.up"):
        running.told(mark, NORTH, words)
    running.told(mark, SOUTH, "site.started")
    running.happened(mark, "reply.refused", site=NORTH, code="LF5303")
    assert not [pid for pid in before if alive(pid)], "it left nobody behind"
    running.survived(mark, north=1, south=1)


@fault(
    name="the SuperNode ends by itself, with exit code 0 or another",
    where="site",
    sees="site: `connection.ended status=0`, `connection.up`",
    lost="at most its contribution to one round",
    normal_s=20,
)
@fault(
    name="the training process is killed (`kill -9`, out of memory)",
    where="site",
    sees="site: `trainer.died status=-9` when it was at work; coordinator: `reply.refused` LF5311",
    lost="at most its contribution to one round",
    normal_s=20,
)
def test_a_supernode_that_ends_and_a_killed_training_process_are_replaced(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    running.signal(NORTH, signal.SIGTERM, "supernode")
    (killed,) = running.signal(EAST, signal.SIGKILL, "trainer")
    running.normal((NORTH, rows[0]), (EAST, rows[1]))
    running.told(mark, NORTH, "connection.ended status=0")
    running.told(mark, NORTH, "connection.up")
    assert running.pid(EAST, "trainer") != killed
    running.survived(mark, north=1, east=1)


@fault(
    name="the SuperNode hangs",
    where="site",
    sees="site: `connection.hung` after a minute, `connection.up`; coordinator: `reply.refused` "
    "LF5303 or LF5306",
    lost="its contribution to one or two rounds",
    normal_s=90,
)
@fault(
    name="the training process hangs: stopped, deadlocked, waiting for a dead disk",
    where="site",
    sees="site: `trainer.killed training took longer than ...` when the round's time is over, or "
    "`training hung` after a minute; coordinator: `reply.refused` LF5306, then `reply.late`",
    lost="its contribution to one or two rounds",
    normal_s=50,
)
def test_what_hangs_is_ended_and_the_site_takes_part_again(running: Running, rows: Rows) -> None:
    mark = running.mark()
    running.signal(SOUTH, signal.SIGSTOP, "supernode")
    (hung,) = running.signal(EAST, signal.SIGSTOP, "trainer")
    running.normal((SOUTH, rows[0]), (EAST, rows[1]))
    running.told(mark, SOUTH, "connection.hung")
    running.told(mark, EAST, "trainer.killed training ")
    running.happened(mark, "reply.refused", site=EAST, code="LF5306")
    assert running.pid(EAST, "trainer") != hung
    running.survived(mark, south=2, east=2)


@fault(
    name="all processes of the site are killed at once (power cut)",
    where="site",
    sees="site, after the service manager's restart: `connection.refused` until the coordinator "
    "lets it in again, `connection.up`; coordinator: `reply.refused` LF5303",
    lost="its contribution to one or two rounds",
    normal_s=60,
)
def test_a_site_that_is_killed_as_a_whole_comes_back(running: Running, rows: Rows) -> None:
    mark = running.mark()
    for pid in running.pids(NORTH):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.normal((NORTH, rows[0]))
    running.told(mark, NORTH, "connection.up")
    running.survived(mark, north=2)


def alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"

"""A site's machine sleeps, fills up, tells another time, or has a broken install."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.rows import Fault, fault
from tests.faults.running import CLOCKED, Running

NORTH, EAST, SOUTH = CLOCKED, "east", "south"
ASLEEP_S = float(os.environ.get("LEPTON_FED_ASLEEP_S", "75"))
CLOCK_OFF_S = 600
WHILE_S = 8.0
Rows = tuple[Fault, ...]


@fault(
    name="the machine sleeps for minutes",
    where="site",
    sees="coordinator: `reply.refused` LF5303; the run goes on with the others",
    lost="its contribution to one round",
    normal_s=45,
)
@fault(
    name="the clock is 10 minutes off",
    where="site",
    sees="site: `connection.refused ... this machine's clock is 600 s ahead of the coordinator's; "
    "set both by NTP`",
    lost="its contribution to the rounds until the clock is right",
    normal_s=45,
)
def test_a_machine_that_slept_and_one_whose_clock_was_off_take_part_again(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    clock = running.faults(NORTH) / "clock"
    pids = running.signal(EAST, signal.SIGSTOP, "supervisor", "supernode", "trainer")
    clock.write_text(str(CLOCK_OFF_S))
    running.told(mark, NORTH, "s ahead of the coordinator's; set both by NTP")
    running.happened(mark, "reply.refused", site=EAST, code="LF5303")
    clock.write_text("0")
    running.normal((NORTH, rows[1]))
    running.told(mark, NORTH, "connection.up")
    time.sleep(max(0.0, ASLEEP_S - (time.monotonic() - mark.time_s)))
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    running.normal((EAST, rows[0]))
    assert running.pid(EAST, "trainer") == pids[2], "a healthy process was kept"
    running.survived(mark, north=1, east=2)


@fault(
    name="the training process cannot be started (broken install)",
    where="site",
    sees="site: the import's traceback, `trainer.died status=1`; coordinator: `reply.refused` "
    "LF5311",
    lost="its contribution to the rounds until the install is mended",
    normal_s=40,
)
@fault(
    name="the SuperNode cannot be started (broken install)",
    where="site",
    sees="site: `connection.ended status=1: ModuleNotFoundError: ...`",
    lost="its contribution to the rounds until the install is mended",
    normal_s=45,
)
def test_a_site_with_a_broken_install_is_back_when_it_is_mended(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    trainer, supernode = (running.faults(site) / "broken" for site in (SOUTH, EAST))
    trainer.write_text("lepton_fed.clients.trainer torch")
    supernode.write_text("lepton_fed.flower.supernode flwr")
    running.signal(SOUTH, signal.SIGKILL, "trainer")
    running.signal(EAST, signal.SIGTERM, "supernode")
    running.told(mark, SOUTH, "ModuleNotFoundError: ")
    running.told(mark, SOUTH, "trainer.died status=1")
    running.happened(mark, "reply.refused", site=SOUTH, code="LF5311")
    running.told(mark, EAST, "connection.ended status=1: ModuleNotFoundError: ")
    time.sleep(WHILE_S)
    trainer.unlink()
    supernode.unlink()
    running.normal((SOUTH, rows[0]), (EAST, rows[1]))
    running.survived(mark, south=20, east=1)


@fault(
    name="the disk is full",
    where="site",
    sees="site: `site.refused ... cannot be written`; coordinator: `reply.refused` LF4202 or "
    "LF5209, `its disk may be full`",
    lost="its contribution to the rounds until there is room again",
    normal_s=20,
)
def test_nothing_leaves_a_site_whose_disk_is_full_and_it_goes_on_when_there_is_room(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    supervisor = running.pid(NORTH, "supervisor")
    running.fill_disk(NORTH)
    refused = running.happened(mark, "reply.refused", site=NORTH)
    assert refused["code"] in {"LF4202", "LF5209"}, refused
    assert "its disk may be full" in refused["why"]
    running.told(mark, NORTH, "cannot be written: File too large")
    time.sleep(WHILE_S)
    running.free_disk(NORTH)
    running.normal((NORTH, rows[0]))
    assert running.pid(NORTH, "supervisor") == supervisor, "no restart was needed"
    running.survived(mark, north=20)

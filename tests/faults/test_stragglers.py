"""One slow site never slows the others beyond the coordinator's patience."""

from __future__ import annotations

import os
import signal
import threading

from tests.faults.rows import Fault, fault
from tests.faults.running import Running

EAST = "east"
STOPPED_S, RUNNING_S = 26.0, 1.0
LATE_ROUNDS = 2


@fault(
    name="one site is far slower than the others",
    where="site",
    sees="coordinator: `reply.refused` LF5306 when `patience` is over, `reply.late` when it "
    "answers",
    lost="its contribution to the rounds for which it was too late; the others wait `patience` "
    "times the expected time, no longer",
    normal_s=40,
)
def test_a_slow_site_is_late_and_the_others_wait_no_longer_than_patience(
    running: Running, rows: tuple[Fault, ...]
) -> None:
    mark = running.mark()
    pid = running.pid(EAST, "trainer")
    fast = threading.Event()

    def slow() -> None:
        while not fast.is_set():
            os.kill(pid, signal.SIGSTOP)
            fast.wait(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            fast.wait(RUNNING_S)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        running.wait_for(
            "late rounds",
            lambda: (
                len(running.since(mark, "reply.refused", site=EAST, code="LF5306")) >= LATE_ROUNDS
            ),
            120,
        )
        running.happened(mark, "reply.late", site=EAST)
    finally:
        fast.set()
        thread.join()
    running.normal((EAST, rows[0]))
    assert running.pid(EAST, "trainer") == pid, "slow is not hung"
    running.survived(mark, east=LATE_ROUNDS + 2)

"""One slow site never slows the others beyond the coordinator's patience; `runs show` says who."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import kill
from signal import SIGCONT, SIGSTOP

from tests.e2e.federation import lepton
from tests.faults.rows import Fault, fault
from tests.faults.running import Running

NORTH, EAST, SOUTH = "north", "east", "south"
STOPPED_S, RUNNING_S = 6.0, 0.05  # less than what is taken for hung
LATE_ROUNDS = 2
Rows = tuple[Fault, ...]


@contextmanager
def slow(running: Running, site: str) -> Iterator[None]:
    """Let the training process of a site have a hundredth of its time."""
    fast = threading.Event()

    def slow_down() -> None:
        while not fast.is_set():
            pid = running.find(site, "trainer")
            with suppress(ProcessLookupError):
                for number, seconds in ((SIGSTOP, STOPPED_S), (SIGCONT, RUNNING_S)):
                    if pid:
                        kill(pid, number)
                    fast.wait(seconds)
        running.free(site)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        fast.set()
        thread.join()


@fault(
    name="one site is far slower than the others",
    where="site",
    sees="coordinator: `reply.refused` LF5306 when `patience` is over, `reply.late` when it "
    "answers; site: `trainer.killed training took longer than ...`",
    lost="its contribution to the rounds for which it was too late; the others wait `patience` "
    "times the expected time, no longer",
    normal_s=45,
)
def test_a_slow_site_is_late_and_the_others_wait_no_longer_than_patience(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    with slow(running, EAST):
        running.wait_for(
            "late rounds",
            lambda: (
                len(running.since(mark, "reply.refused", site=EAST, code="LF5306")) >= LATE_ROUNDS
            ),
            120,
        )
        running.told(mark, EAST, "trainer.killed training took longer than")
    running.normal((EAST, rows[0]))
    running.happened(mark, "reply.late", site=EAST)
    running.survived(mark, east=LATE_ROUNDS + 2)


@fault(
    name="a site is stopped by its owner, and started again later",
    where="site",
    sees="coordinator: it is `absent` in `round.started`",
    lost="its contribution to the rounds meanwhile; the others do not wait for it",
    normal_s=40,
)
def test_runs_show_says_who_was_late_refused_or_absent_and_why(
    running: Running, rows: Rows
) -> None:
    mark = running.mark()
    with slow(running, EAST):
        late = running.happened(mark, "reply.refused", site=EAST, code="LF5306")
    running.whole()
    running.fill_disk(NORTH)
    refused = running.happened(mark, "reply.refused", site=NORTH)
    running.free_disk(NORTH)
    running.stop_site(SOUTH)
    gone = running.mark()
    running.wait_for(
        "rounds without it",
        lambda: [e for e in running.since(gone, "round.started") if SOUTH in e["absent"]],
        60,
    )
    running.start_site(SOUTH)
    running.normal((SOUTH, rows[0]))
    shown = lepton("runs", "show", late["run"], "--all", cwd=running.root).stdout
    lines = " ".join(shown.split())
    assert f"round {late['round']}: {EAST}: no reply in time (LF5306)" in lines
    assert f"round {refused['round']}: {NORTH}: {refused['why']} ({refused['code']})" in lines
    about = {site: next(line for line in shown.splitlines() if line.startswith(f"{site}: "))
             for site in (NORTH, EAST, SOUTH)}  # fmt: skip
    assert f"{EAST}: late " in about[EAST]
    assert f"{refused['why']} ({refused['code']})" in about[NORTH]
    assert "absent " in about[SOUTH]
    assert "it was not online" in about[SOUTH]
    for site in (NORTH, EAST, SOUTH):
        running.records_hold(site)

"""Two hundred masked rounds in which something fails all the time: nothing is lost, nothing grows.

LEPTON_FED_SOAK_SEED chooses the faults, LEPTON_FED_SOAK_ROUNDS the length; with LEPTON_FED_BUSY=4
everything may take four times as long.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.federation import lepton
from tests.faults.running import BUSY, MASKED_SITES, Part, Running, stamp
from tests.soak.samples import Bound, Sample, Series, measured, size_of
from tests.soak.schedule import Planned, schedule

ROUNDS = int(os.environ.get("LEPTON_FED_SOAK_ROUNDS", "200"))
SEED = int(os.environ.get("LEPTON_FED_SOAK_SEED", "1"))

LOOK_S, SAMPLE_S = 0.2, 1.0
BACK_S = 150.0 * BUSY  # for a site that a further fault waits for
STANDSTILL_S = 180.0 * BUSY
SLACK_S = 15.0 * BUSY
PARTS: tuple[Part, ...] = ("supervisor", "supernode", "trainer")
PROCESS_BOUNDS = {
    "memory": Bound(0.10, 8.0),  # MiB
    "files": Bound(0.0, 6.0, leak=16.0),
    "threads": Bound(0.0, 6.0, leak=16.0),
}
FILE_BOUNDS = {
    "database": Bound(0.10, 1.0),  # MiB
    "replies": Bound(0.10, 1.0),
    "answers": Bound(0.10, 0.1),
    "checkpoints": Bound(0.10, 0.1),
    "masked": Bound(0.10, 0.1),
    "files of masked rounds, sites": Bound(0.0, 3.0),  # a count, as of here
    "files of masked rounds, coordinator": Bound(0.0, 3.0),
}
MOST_FILES = {  # of the two runs, where each site is; of the one in progress, a vector
    "files of masked rounds, sites": 4 * len(MASKED_SITES),
    "files of masked rounds, coordinator": 4,  # three, and one half written
}
WAITS = len(MASKED_SITES) - 3 + 1
"""Phases of a round that may wait for a site in vain: each loses one, and three have to stay."""


class Soak(Running):
    """A run that is harmed as planned, and watched.

    Args:
        root: Where everything goes.
        plan: The faults to come.
    """

    def __init__(self, root: Path, plan: tuple[Planned, ...]) -> None:
        super().__init__(root, rounds=ROUNDS)
        self.run = ""
        self.happened_to: Counter[tuple[str, str]] = Counter()
        self.series: dict[tuple[str, str], Series] = {}
        self._plan = list(plan)
        self._heals: list[tuple[float, Callable[[], object]]] = []
        self._sampled = self._due = 0.0

    def live(self) -> None:
        """Let the run happen, from its start to its end."""
        closed, since = 0, time.monotonic()
        while not self.since_start("run.finished"):
            newest = max((e["round"] for e in self.since_start("round.closed")), default=0)
            now = time.monotonic()
            if newest > closed:
                closed, since = newest, now
            assert now - since < STANDSTILL_S, self.ends(f"no round after {closed} was closed")
            if self.submitted.poll() is not None:
                told = (self.root / "submit.log").read_text()
                assert self.since_start("run.finished"), told
            self._heal(now)
            self._harm(closed, now)
            if now - self._sampled >= SAMPLE_S:
                self._sampled = now
                self._sample(closed)
            time.sleep(LOOK_S)

    def since_start(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name of the run that is harmed."""
        return [e for e in self.events() if e["run"] == self.run and e["event"] == name]

    def ends(self, what: str) -> str:
        """Return the end of what everybody said."""
        said = [f"--- {who}\n{self.said(who)[-2000:]}" for who in ("coordinator", *self.sites)]
        return "\n".join([what, *said])

    # --- faults

    def _heal(self, now: float) -> None:
        due = [heal for at, heal in self._heals if at <= now]
        self._heals = [(at, heal) for at, heal in self._heals if at > now]
        for heal in due:
            heal()

    def _harm(self, closed: int, now: float) -> None:
        if (
            not self._plan
            or closed < self._plan[0].after_round
            or "coordinator" not in self.processes
        ):
            self._due = now
            return
        planned = self._plan[0]
        if planned.site and not all(self.find(planned.site, part) for part in PARTS):
            assert now - self._due < BACK_S, self.ends(f"{planned.site} is not back")
            return
        if planned.phase and not self._in_phase(planned.phase):
            return
        del self._plan[0]
        with suppress(ProcessLookupError):  # another fault was faster
            self._heals.append((now + planned.lasting_s, self._do(planned)))
            self.happened_to[planned.kind, planned.site or "coordinator"] += 1
            said = (
                f"round {closed}: {planned.kind} {planned.site} {planned.phase} "
                f"{planned.lasting_s or ''}\n"
            )
            with (self.root / "faults.txt").open("a") as notes:
                notes.write(said)

    def _in_phase(self, phase: str) -> bool:
        """Look for a phase to begin, for as long as one look takes."""
        with suppress(AssertionError):
            return bool(self.asked_for(phase, LOOK_S))
        return False

    def _do(self, planned: Planned) -> Callable[[], object]:
        """Do what is planned and return what takes it back."""
        site, kind = planned.site, planned.kind
        if kind == "coordinator killed":
            self.kill("coordinator")
            return lambda: self.start("coordinator")
        if kind.startswith("line"):
            self.lines[site].cut("silent" if kind == "line silent" else "refusing")
            return self.lines[site].heal
        if kind == "disk full":
            self.fill_disk(site)
            return lambda: self.free_disk(site)
        if kind == "trainer stopped":
            self.signal(site, signal.SIGSTOP, "trainer")
            return lambda: self.free(site)
        if kind == "site stopped":
            self.signal(site, signal.SIGSTOP, *PARTS)
            return lambda: self.free(site)
        killed: dict[str, Part] = {
            "service killed": "supervisor",
            "SuperNode killed": "supernode",
            "trainer killed": "trainer",
        }
        self.signal(site, signal.SIGKILL, killed[kind])
        return lambda: None

    # --- samples

    def _sample(self, closed: int) -> None:
        pids = {f"{site}'s {part}": self.find(site, part) for site in self.sites for part in PARTS}
        coordinator = self.processes.get("coordinator")
        pids["coordinator"] = coordinator.pid if coordinator else 0
        for who, pid in pids.items():
            for what, value in (measured(pid) or {} if pid else {}).items():
                self._take(who, what, PROCESS_BOUNDS[what], Sample(closed, pid, value))
        state = self.root / "state"
        (run,) = (self.root / "runs").glob(self.run)
        sizes = {
            "database": size_of(lambda: list((state / "coordinator").glob("flower.sqlite*"))),
            "replies": size_of(lambda: list((state / "coordinator" / "replies").iterdir())),
            "answers": size_of(lambda: list(state.glob("*/answers/*"))),
            "checkpoints": size_of(lambda: list((run / "checkpoints").iterdir())),
            "masked": size_of(lambda: list(state.glob("*/masked/*"))),
            "files of masked rounds, sites": len(list(state.glob("*/masked/*"))),
            "files of masked rounds, coordinator": len(list(run.glob("masked/*"))),
        }
        for what, value in sizes.items():
            self._take("disk", what, FILE_BOUNDS[what], Sample(closed, 0, value))

    def _take(self, who: str, what: str, bound: Bound, sample: Sample) -> None:
        self.series.setdefault((who, what), Series(bound, ROUNDS)).add(sample)

    def write_samples(self) -> None:
        """Keep every sample beside the logs, for whoever looks for the reason of a growth."""
        with (self.root / "samples.csv").open("w") as file:
            file.write("who,what,round,process,value\n")
            for (who, what), series in self.series.items():
                for row in series.rows():
                    file.write(",".join(map(str, (who, what, *row))) + "\n")

    def table(self) -> str:
        """Return what was sampled and what was done, for whoever reads the test's output."""
        lines = [f"{'':34}  median by quarter of the run          growth in {ROUNDS} rounds"]
        for (who, what), series in self.series.items():
            quarters = "  ".join(f"{value:8.1f}" for value in series.quarters())
            by_run = series.slope() * ROUNDS
            lines.append(f"{who + ', ' + what:34}  {quarters}  {by_run:8.1f}")
        done = ", ".join(f"{count} {kind}" for kind, count in self._by_kind().items())
        missed = dict.fromkeys(self.sites, 0)
        for event in self.since_start("round.closed"):
            for site in set(self.sites) - set(event["sites"]):
                missed[site] += 1
        lines += [f"faults: {done}", f"rounds without: {missed}", f"seed {SEED}"]
        return "\n".join(lines)

    def _by_kind(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (kind, _), count in self.happened_to.items():
            found[kind] += count
        return found


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    """The run, begun."""
    found = Soak(tmp_path, schedule(SEED, ROUNDS))
    try:
        found.start_all()
        found.run = found.events()[-1]["run"]
        found.task = found.first  # of the coordinator's own conf, which a restart does not change
        yield found
    finally:
        found.stop()


@pytest.mark.soak
def test_nothing_is_lost_and_nothing_grows_over_many_rounds_of_faults(
    soak: Soak, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\nseed {SEED}, {ROUNDS} rounds\n")
    try:
        soak.live()
    finally:
        soak.write_samples()
        with capsys.disabled():
            sys.stdout.write(soak.table() + "\n")
    assert soak.submitted.wait(60) == 0, "who asked for the run is told that it is finished"
    rounds_hold(soak)
    for site in soak.sites:
        soak.records_hold(site)
    bundle_holds(soak)
    complaints = [
        f"{who}, {what}: {complaint}"
        for (who, what), series in soak.series.items()
        for complaint in series.complaints()
    ]
    for what, most in MOST_FILES.items():
        found = max(value for _, _, value in soak.series["disk", what].rows())
        if found > most:
            complaints.append(f"{what}: {found:g}, at most {most} are of use")
    assert not complaints, "\n".join(complaints)
    soak.stop()
    assert not left_running(soak.root)


def rounds_hold(soak: Soak) -> None:
    """Each round was closed once, in order, within the coordinator's patience; all came back."""
    closed = soak.since_start("round.closed")
    assert [event["round"] for event in closed] == list(range(1, ROUNDS + 1))
    assert set(closed[-1]["sites"]) == set(soak.sites)
    began: dict[int, float] = {}
    for event in soak.events():
        if event["run"] == soak.run and event["event"] == "round.started":
            began[event["round"]] = stamp(event)  # anew, when the coordinator was killed
    for event in closed:
        took_s = stamp(event) - began[event["round"]]
        assert took_s <= WAITS * soak.patience * 20.0 + SLACK_S, event
    shown = json.loads(lepton("runs", "show", soak.run, "--json", cwd=soak.root).stdout)
    assert shown["state"] == "finished"
    assert shown["digest"] == closed[-1]["digest"]


def bundle_holds(soak: Soak) -> None:
    """A run that was interrupted so often makes a bundle that sites take."""
    lepton("export", soak.run, cwd=soak.root)
    bundle = soak.root / "runs" / soak.run / "bundle"
    lepton("push", str(bundle), "--conf", "server.yaml", cwd=soak.root)
    for site in soak.sites:
        soak.records(site).bundle_holds()


def left_running(root: Path) -> list[str]:
    """Return the commands of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").resolve().is_relative_to(root):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found

"""A federation whose processes, machines and lines can be made to fail while it trains."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from tests.e2e.federation import SITES, Deployment, lepton
from tests.faults.proxy import Line
from tests.faults.records import Records
from tests.faults.rows import Fault, Rounds

__all__ = [
    "BUSY",
    "CLOCKED",
    "MASKED_SITES",
    "MODULES",
    "PHASES",
    "RESTART_S",
    "Event",
    "Mark",
    "Part",
    "Running",
    "child",
    "stamp",
]

Part = Literal["supervisor", "supernode", "trainer"]
Event = dict[str, Any]

ROUNDS = 3000
CLOCKED = "north"
"""The site whose clock can be set; see sitecustomize.txt."""

RESTART_S = 5.0
"""RestartSec of the service manager that these tests stand in for."""

THRESHOLD = 0.51
MASKED_SITES = (*SITES, "west", "centre")
"""Of five, two may be lost at once, as some tests have it: three are needed."""

PHASES = ("share", "mask", "confirm", "reveal")
"""What is asked of a cohort in a masked round, one after another."""

MODULES = {"supernode": "lepton_fed.flower.supernode", "trainer": "lepton_fed.clients.trainer"}
BUSY = float(os.environ.get("LEPTON_FED_BUSY", "1"))
"""How many times as long everything may take: more than 1 where others are at work too."""

_SLACK_S = 6.0  # two cores, a coordinator and fifteen other processes on them
_LOOK_S = 0.2
_PHASE_LOOK_S = 0.005
_FIRST_S = 240.0
_SHOWN = 2000


@dataclasses.dataclass(frozen=True)
class Mark:
    """The moment of a fault.

    Args:
        events: How many events there were.
        time_s: When, on a clock that never goes back.
        said: How many characters each site had said.
    """

    events: int
    time_s: float
    said: dict[str, int]


class Running(Deployment):
    """A coordinator and sites in the middle of a long run with DP, all holding a pushed bundle.

    Args:
        root: Where everything goes.
        patience: The coordinator's; 1 waits 20 s for a site that does not answer.
        rounds: Rounds of the run that is in progress.
        kind: Whether sites' updates are masked.
    """

    def __init__(
        self,
        root: Path,
        patience: float = 1.0,
        rounds: int = ROUNDS,
        kind: Rounds = "masked",
    ) -> None:
        masked = kind == "masked"
        own = (f"privacy.secure_aggregation.threshold={THRESHOLD}",) if masked else ()
        super().__init__(
            root,
            f"rounds.count={rounds}",
            "rounds.quorum=1",
            *own,
            secure=masked,
            sites=MASKED_SITES if masked else SITES,
        )
        self.patience = patience * BUSY
        self.first = ("rounds.count=1", f"rounds.quorum={len(self.sites)}", *own)
        self.lines = {name: Line(self.port) for name in ("north", "south")}  # east goes straight
        self._keeping: dict[str, threading.Event] = {}
        self._found: list[Event] = []
        self._offsets: dict[Path, int] = {}
        shim = Path(__file__).with_name("sitecustomize.txt")
        for name in self.sites:
            folder = self.faults(name)
            folder.mkdir(parents=True)
            shutil.copy(shim, folder / "sitecustomize.py")
            self._edit(name)
        self._edit("server")
        (self.faults(CLOCKED) / "clock").write_text("0")

    def faults(self, site: str) -> Path:
        """Return the folder of what is wrong at a site; see sitecustomize.txt."""
        return self.root / "faults" / site

    def _edit(self, name: str) -> None:
        path = self.root / f"{name}.yaml"
        conf = yaml.safe_load(path.read_text())
        if name == "server":
            conf["patience"] = self.patience
        else:
            if name in self.lines:
                conf["coordinator"] = f"127.0.0.1:{self.lines[name].port}"
            if self.secure:  # each has a roster of its own, as on its own disk
                handed = self.root / "handed" / f"{name}.json"
                handed.parent.mkdir(exist_ok=True)
                shutil.copy(self.root / "keys" / "roster.json", handed)
                conf["roster"] = f"handed/{name}.json"
            conf["policy"]["rounds"] = 1_000_000
            conf["policy"]["privacy"]["secure_aggregation"] |= {
                "threshold": THRESHOLD,
                "rounds_per_hour": 1_000_000,
            }
            conf["policy"]["privacy"]["epsilon"] = conf["budget"]["epsilon"] = 100.0
        path.write_text(yaml.safe_dump(conf))

    # --- processes

    def start_site(self, site: str) -> None:
        """Start a site and keep it up, as a service manager with Restart=always does."""
        ending = self._keeping[site] = threading.Event()
        self._spawn(site)
        threading.Thread(target=self._keep, args=(site, ending), daemon=True).start()

    def stop_site(self, site: str) -> None:
        """Stop a site, as its service manager is told to."""
        self._keeping.pop(site).set()
        self.processes[site].terminate()
        self.processes[site].wait(30)

    def _spawn(self, site: str) -> None:
        command = [sys.executable, "-m", "lepton_fed", "client", "--conf", f"{site}.yaml"]
        folder = self.faults(site)
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            stdout=subprocess.PIPE,  # as to a journal, which no disk of the site's holds up
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                 "FAULTS": str(folder)},
        )  # fmt: skip
        self.processes[site] = process
        assert process.stdout is not None
        threading.Thread(target=self._journal, args=(site, process.stdout), daemon=True).start()

    def _journal(self, site: str, said: IO[str]) -> None:
        with (self.root / f"{site}.log").open("a") as log, said:
            for line in said:
                log.write(line)
                log.flush()

    def _keep(self, site: str, ending: threading.Event) -> None:
        while not ending.wait(_LOOK_S):
            if self.processes[site].poll() is not None and not ending.wait(RESTART_S):
                self._spawn(site)

    def start_all(self) -> None:
        """Start everything, give each site a bundle, and begin the long run."""
        wanted, self.task = self.task, self.first
        self.start("coordinator")
        for name in self.sites:
            self.start_site(name)
        self.wait_for_event("run.finished")
        lepton("export", "last", cwd=self.root)
        (bundle,) = self.root.glob("runs/*/bundle")
        lepton("push", str(bundle), "--conf", "server.yaml", cwd=self.root)
        self.task = wanted
        words = ["runs", "submit", "--conf", "server.yaml", *self.task]
        with (self.root / "submit.log").open("w") as log:
            self.submitted = subprocess.Popen(
                [sys.executable, "-m", "lepton_fed", *words], cwd=self.root, stdout=log, stderr=log
            )
        self.whole()

    def stop(self) -> None:
        """End everything; the coordinator, which would finish its run first, by force."""
        for ending in self._keeping.values():
            ending.set()
        self.kill("coordinator")
        if hasattr(self, "submitted"):
            self.submitted.kill()
            self.submitted.wait()
        for line in self.lines.values():
            line.close()
        for name in self.sites:
            self.free(name)
        super().stop()

    def kill(self, who: str) -> None:
        """End the coordinator or a site's supervisor with SIGKILL."""
        process = self.processes.pop(who, None)
        if process is not None:
            process.kill()
            process.wait()

    def pid(self, site: str, part: Part) -> int:
        """Return the process of a part of a site, once there is one."""
        return int(self.wait_for(f"{part} of {site}", lambda: self.find(site, part), 60))

    def find(self, site: str, part: Part) -> int:
        """Return the process of a part of a site; 0 when there is none."""
        service = self.processes[site]
        if service.poll() is not None:
            return 0
        return service.pid if part == "supervisor" else child(service.pid, MODULES[part])

    def pids(self, site: str) -> list[int]:
        """Return all processes of a site."""
        return [
            self.pid(site, "supervisor"),
            self.pid(site, "supernode"),
            self.pid(site, "trainer"),
        ]

    def signal(self, site: str, number: int, *parts: Part) -> list[int]:
        """Send a signal to parts of a site and return their process numbers."""
        pids = [self.pid(site, part) for part in parts]
        for pid in pids:
            os.kill(pid, number)
        return pids

    def fill_disk(self, site: str) -> None:
        """Let no process of a site write to a file any more."""
        for pid in self.pids(site):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def free_disk(self, site: str) -> None:
        """Let them write again, also the ones that were started meanwhile."""
        supervisor = self.pid(site, "supervisor")
        for pid in [supervisor, *children(supervisor)]:
            with suppress(ProcessLookupError):
                limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def free(self, site: str) -> None:
        """Let go on whatever was stopped at a site."""
        process = self.processes.get(site)
        if process is None or process.poll() is not None:
            return
        for pid in [process.pid, *children(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def mend(self) -> None:
        """Take back every fault that a test may have left."""
        coordinator = self.processes.get("coordinator")
        if coordinator is None or coordinator.poll() is not None:
            self.start("coordinator")
        for name in self.sites:
            (self.faults(name) / "broken").unlink(missing_ok=True)
            self.free(name)
            self.free_disk(name)
        (self.faults(CLOCKED) / "clock").write_text("0")
        for line in self.lines.values():
            if line.is_cut:
                line.heal()

    # --- what is seen

    def wait_for(self, what: str, found: Callable[[], Any], seconds: float = _FIRST_S) -> Any:
        """Wait until ``found()`` is something, or show the end of what everybody said."""
        until = time.monotonic() + seconds * BUSY
        while time.monotonic() < until:
            result = found()
            if result:
                return result
            time.sleep(_LOOK_S)
        ends = [f"--- {who}\n{self.said(who)[-_SHOWN:]}" for who in ("coordinator", *self.sites)]
        raise AssertionError("\n".join([f"{what}: not within {seconds:g} s", *ends]))

    def events(self) -> list[Event]:
        """Return the events of all runs so far, in the order in which they were read."""
        for path in sorted((self.root / "runs").glob("*/events.jsonl")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            run = path.parent.name
            self._found += [{**json.loads(line), "run": run} for line in whole.splitlines()]
        return self._found

    def mark(self) -> Mark:
        """Return this moment."""
        said = {name: len(self.said(name)) for name in self.processes}
        return Mark(len(self.events()), time.monotonic(), said)

    def since(self, mark: Mark, name: str, **fields: Any) -> list[Event]:
        """Return the events of a name after a moment."""
        return [
            event
            for event in self.events()[mark.events :]
            if event["event"] == name and all(event.get(k) == v for k, v in fields.items())
        ]

    def told(self, mark: Mark, who: str, words: str, seconds: float = 60.0) -> None:
        """Wait until a site or the coordinator has said these words after a moment."""
        start = mark.said.get(who, 0)
        self.wait_for(f"{who}: {words}", lambda: words in self.said(who)[start:], seconds)

    def happened(self, mark: Mark, name: str, seconds: float = 60.0, **fields: Any) -> Event:
        """Wait for an event after a moment."""
        found = self.wait_for(f"{name} {fields}", lambda: self.since(mark, name, **fields), seconds)
        return dict(found[0])

    def phase(self) -> tuple[int, str]:
        """Return the round and the phase that the coordinator has written down that it asks for.

        Round 0 stands for none: between two rounds, and before a cohort is formed.
        """
        for path in sorted((self.root / "runs").glob("*/masked/group-*.json")):
            with suppress(OSError, KeyError, ValueError):
                saved = json.loads(path.read_bytes())
                return int(saved["whose"]["serial"]), str(saved["stage"])
        return 0, ""

    def asked_for(self, phase: str, seconds: float = 60.0) -> int:
        """Wait until a phase begins to be asked for from now on, and return the round."""
        until = time.monotonic() + seconds * BUSY
        before = self.phase()
        while time.monotonic() < until:
            now = self.phase()
            if now != before and now[1] == phase:
                return now[0]
            before = now
            time.sleep(_PHASE_LOOK_S)
        raise AssertionError(f"{phase} was not asked for within {seconds:g} s")

    def whole(self, seconds: float = _FIRST_S) -> float:
        """Wait for a round that began from now on and that all sites contribute to.

        Returns:
            Seconds until it began.
        """
        mark = self.mark()

        def found() -> list[float]:
            started = {(e["run"], e["round"]) for e in self.since(mark, "round.started")}
            good = [
                event
                for event in self.since(mark, "round.closed")
                if (event["run"], event["round"]) in started
                and len(event["sites"]) == len(self.sites)
            ]
            return [time.monotonic() - mark.time_s] if good else []

        return float(self.wait_for("a round of all sites", found, seconds)[0])

    def normal(self, *bounds: tuple[str, Fault]) -> None:
        """Assert that sites contribute again in time to a round that begins from now on.

        Args:
            bounds: Name of each site, and the row that says how long that may take.
        """
        mark = self.mark()
        took: dict[str, float] = {}

        def found() -> bool:
            started = {(e["run"], e["round"]) for e in self.since(mark, "round.started")}
            for event in self.since(mark, "round.closed"):
                if (event["run"], event["round"]) in started:
                    for site in event["sites"]:
                        took.setdefault(site, time.monotonic() - mark.time_s)
            return all(site in took for site, _ in bounds)

        longest = max(row.normal_s for _, row in bounds) + _SLACK_S
        self.wait_for("a round of them all", found, longest)
        with (self.root / "took.txt").open("a") as notes:
            for site, row in bounds:
                notes.write(f"{took[site]:6.1f} of {row.normal_s:g} s: {row.name}\n")
        for site, row in bounds:
            assert took[site] <= (row.normal_s + _SLACK_S) * BUSY, (row.name, took[site])

    # --- what must hold

    def others_go_on(self, mark: Mark, *sites: str) -> None:
        """Assert that each round since contains the other sites, and none lasted too long."""
        others = set(self.sites) - set(sites)
        started: dict[tuple[str, int], float] = {}
        # In a masked round each phase may lose another site, and wait for it.
        waits = max(1, len(sites)) if self.secure else 1
        longest = waits * self.patience * 20.0 + _SLACK_S * BUSY
        closed = 0
        for event in self.events()[mark.events :]:
            key = (event["run"], event.get("round", 0))
            if event["event"] == "round.started":
                started[key] = stamp(event)
            elif event["event"] == "round.closed":
                closed += 1
                assert others <= set(event["sites"]), event
                if key in started:
                    assert stamp(event) - started[key] <= longest, event
        assert closed, "no round was closed"

    def asked_in_vain(self, mark: Mark, site: str) -> int:
        """Return the rounds since in which a site was asked and did not contribute."""
        asked = {
            (e["run"], e["round"]) for e in self.since(mark, "round.started") if site in e["cohort"]
        }
        asked |= {
            (e["run"], e["round"])
            for e in self.events()[: mark.events][-12:]
            if e["event"] == "round.started"
        }
        return sum(
            site not in event["sites"]
            for event in self.since(mark, "round.closed")
            if (event["run"], event["round"]) in asked
        )

    def records_hold(self, site: str) -> None:
        """Assert that receipts, ledger and bundle are whole, and cover what was accepted."""
        accepted = [  # before the receipts are read: the site goes on
            e for e in self.events() if e["event"] == "reply.accepted" and e["site"] == site
        ]
        records = self.records(site)
        if self.secure:
            self._masked_rounds_hold(site, {(e["run"], e["round"]) for e in accepted}, records)
        else:
            left = records.left()
            for event in accepted:
                updates = left.get((event["run"], event["round"]), {}).values()
                assert any(abs(u.norm - event["norm"]) < 1e-4 for u in updates), event
            charged = records.charged()
            for key, each in left.items():
                assert charged[key] >= len(each), f"{key} left and was not charged"
        records.bundle_holds()

    def _masked_rounds_hold(
        self, site: str, accepted: set[tuple[str, int]], records: Records
    ) -> None:
        """Assert that what is in a sum left, was charged, and is in no other sum."""
        sums: dict[tuple[str, int], set[tuple[str, ...]]] = {}
        for event in self.events():
            if event["event"] == "secagg.opened" and event["round"] < self.rounds_of(event["run"]):
                sums.setdefault((event["run"], event["round"]), set()).add(tuple(event["sites"]))
        assert all(len(each) == 1 for each in sums.values()), "another sum of the same updates"
        left = records.masked()
        for key in accepted:
            assert len(left[key].vectors) == 1, f"{site} is in the sum of {key} and sent none"
        charged = records.charged()
        for key, each in left.items():
            assert charged[key], f"{key} left and was not charged"
            of_site = {", ".join(names) for names in sums.get(key, ())}
            assert each.sums <= of_site or not of_site, (key, each, of_site)

    def rounds_of(self, run: str) -> int:
        """Return how many rounds a run has; its last evaluation has the last one's number."""
        return int(next(e["rounds"] for e in self.events()
                        if e["run"] == run and e["event"] == "round.started"))  # fmt: skip

    def records(self, site: str) -> Records:
        """Return what a site has written down."""
        return Records(self.root, site)

    def survived(self, mark: Mark, **lost: int) -> None:
        """Assert what holds after every fault of sites, once it is over.

        Args:
            mark: When it began.
            lost: Most rounds that each of the sites was asked in in vain, by name.
        """
        self.others_go_on(mark, *lost)
        for site, most in lost.items():
            vain = self.asked_in_vain(mark, site)
            assert vain <= most, (site, vain)
            self.records_hold(site)


def stamp(event: Event) -> float:
    """Return when an event was, seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def children(parent: int) -> list[int]:
    """Return the direct children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def child(parent: int, module: str) -> int:
    """Return the child of a process that runs a module; 0 when there is none."""
    for pid in children(parent):
        with suppress(OSError):
            if module in (Path("/proc") / str(pid) / "cmdline").read_text().split("\0"):
                return pid
    return 0

"""What a run's folder says of it: whether it goes on, how far it is, and how each site takes part.

Everything comes from the event log, the summary and the lock that a writer holds on the log, so
that it is there for a run of another process, and after one that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from lepton_fed.errors import LeptonError
from lepton_fed.runs.events import Event, is_written, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import RunSummary

__all__ = [
    "NOT_HEARD",
    "PASSING",
    "Incident",
    "RunStatus",
    "SiteStatus",
    "State",
    "end_of",
    "outline",
    "read_status",
    "status_of",
]

PASSING = frozenset({"LF5017", "LF5018", "LF5019", "LF5209", "LF5210", "LF5211", "LF5220"})
"""Codes with which a run ends for now: a signal, or a disk, a database or another process that
nothing can be done about in this process. A coordinator's next start goes on with it."""

_OF_A_COORDINATOR = frozenset({"sites.awaited", "site.agreed", "run.resumed"})

State = Literal["running", "interrupted", "failed", "finished", "exported", "damaged"]

NOT_HEARD = frozenset({"LF5303", "LF5304", "LF5306"})
"""Codes that the transport gives in place of a site that said nothing."""

_NO_REPLY = "LF5306"


@dataclass(frozen=True)
class Incident:
    """Why a site's update was missing from a round.

    Args:
        kind: late, refused, or absent.
        round: The round; 0 for the offer of the run.
        code: Code of the error; empty for a site that was absent.
        why: The reason in words.
    """

    kind: Literal["late", "refused", "absent"]
    round: int
    code: str
    why: str


@dataclass(frozen=True)
class SiteStatus:
    """How a site takes part in a run.

    Args:
        name: Name of the site.
        rounds: Rounds in which its update was used.
        seen: UTC time of its last sign of life in this run, ISO 8601; empty when there was none.
        version: Version of lepton-fed that it says it runs; empty when it does not say.
        late: Rounds whose deadline it missed.
        refused: Rounds in which its reply, or the whole run, was refused by it or by the
            coordinator.
        absent: Rounds that began without it although it had agreed.
        last: The newest of these; None when there is none.
        epsilon: Epsilon it says its records spent in this run; None when it says nothing.
        budget_left: Epsilon it says was left of its data set's budget when it agreed; None when it
            says nothing.
        received_bytes: Bytes of its replies that were used.
    """

    name: str
    rounds: int = 0
    seen: str = ""
    version: str = ""
    late: int = 0
    refused: int = 0
    absent: int = 0
    last: Incident | None = None
    epsilon: float | None = None
    budget_left: float | None = None
    received_bytes: int = 0


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Args:
        run: Its name.
        state: running; interrupted (its process is gone, and
            the next start goes on with it); failed; finished; exported (finished, and
            its folder holds a bundle); damaged (its record cannot be relied on).
        code: Code of the error that ended or damaged it; empty otherwise.
        round: Rounds that are over.
        rounds: Rounds of the run; 0 before it has begun.
        began: UTC time of its first event, ISO 8601; empty when there is none.
        newest: UTC time of its last event; empty when there is none.
        seconds: Seconds between the two, or those that the summary names.
        metrics: The newest metrics over all sites' held-out rows, by name.
        digest: Run digest so far.
        waiting: Sites that were asked in the round in progress and have not answered.
        sites: The sites, by name.
        sent_bytes: Bytes of the vectors that rounds sent to sites.
        received_bytes: Bytes of the replies that were used.
    """

    run: str
    state: State
    code: str = ""
    round: int = 0
    rounds: int = 0
    began: str = ""
    newest: str = ""
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    waiting: Sequence[str] = ()
    sites: Sequence[SiteStatus] = ()
    sent_bytes: int = 0
    received_bytes: int = 0


def read_status(run: RunFolder) -> tuple[RunStatus, list[Event]]:
    """Return how a run stands, and its events, after checking their chain.

    Args:
        run: Its folder.

    Raises:
        Refused: The event log was changed or is missing.
        RunError: The folder cannot be read, or its summary is damaged.
    """
    # In this order: what ends in between is seen as ended, not as interrupted.
    written = is_written(run.events)
    summary = run.read_summary()
    if summary is None and not run.events.exists():
        return RunStatus(run.name, "running" if written else "interrupted"), []
    events = read_events(run.events, summary.events if summary else "")
    return status_of(run, summary, events, written=written), events


def outline(run: RunFolder) -> RunStatus:
    """Return how a run stands, for a list of many.

    What a summary says is not compared with the log, which may be long. A damaged record is a
    state, not an error.

    Args:
        run: Its folder.
    """
    try:
        summary = run.read_summary()
        if summary is None:
            return read_status(run)[0]
    except LeptonError as error:
        return RunStatus(run.name, "damaged", error.code)
    finished = datetime.fromisoformat(summary.finished)
    began = finished - timedelta(seconds=summary.seconds)
    return RunStatus(
        run.name,
        _finished(run),
        round=summary.rounds,
        rounds=summary.rounds,
        began=began.isoformat(timespec="milliseconds"),
        newest=finished.isoformat(timespec="milliseconds"),
        seconds=summary.seconds,
        metrics=summary.metrics,
        digest=summary.digest,
        sites=[SiteStatus(s.name, s.rounds, epsilon=s.epsilon) for s in summary.sites],
    )


def end_of(events: Sequence[Event]) -> State:
    """Return how a run ended whose log nobody writes: finished, failed, or interrupted.

    A coordinator goes on at its next start with what it was told to stop, or had no disk for; a
    simulation has no next start.

    Args:
        events: Its events, in order; all, or the last and one that only a coordinator writes.
    """
    last = events[-1] if events else {"event": ""}
    if last["event"] == "run.finished":
        return "finished"
    if last["event"] != "run.failed":
        return "interrupted"
    passing = last["code"] in PASSING
    resumable = passing and any(event["event"] in _OF_A_COORDINATOR for event in events)
    return "interrupted" if resumable else "failed"


def status_of(
    run: RunFolder, summary: RunSummary | None, events: Sequence[Event], *, written: bool
) -> RunStatus:
    """Return how a run stands.

    Args:
        run: Its folder.
        summary: Its summary; None while there is none.
        events: Its events, in order.
        written: Whether a process has its log open.
    """
    found = _Reading()
    for event in events:
        found.take(event)
    state: State = "running" if written else "interrupted"
    code = ""
    if summary is not None:
        state = _finished(run)
        for site in summary.sites:
            found.site(site.name).spent(site.epsilon)
    elif events and events[-1]["event"] == "run.failed" and not written:
        code = str(events[-1]["code"])
        state = end_of(events)
    began, newest = (str(events[0]["time"]), str(events[-1]["time"])) if events else ("", "")
    seconds = summary.seconds if summary else _between(began, newest)
    sites = found.status()
    return RunStatus(
        run.name,
        state,
        code,
        round=found.closed,
        rounds=found.rounds,
        began=began,
        newest=newest,
        seconds=seconds,
        metrics=summary.metrics if summary else found.metrics,
        digest=found.digest,
        waiting=sorted(found.waiting) if state == "running" else [],
        sites=sites,
        sent_bytes=found.sent_bytes,
        received_bytes=sum(site.received_bytes for site in sites),
    )


class _Site:
    """What was read of one site so far."""

    def __init__(self) -> None:
        self.rounds: set[int] = set()
        self.missed: dict[str, set[int]] = {"late": set(), "refused": set(), "absent": set()}
        self.last: Incident | None = None
        self.seen = ""
        self.version = ""
        self.epsilon: float | None = None
        self.budget_left: float | None = None
        self.received_bytes = 0

    def miss(self, incident: Incident) -> None:
        # A set: a round that was begun twice, before and after an interruption, is one round.
        self.missed[incident.kind].add(incident.round)
        self.last = incident

    def spent(self, epsilon: float | None) -> None:
        if epsilon is not None:
            self.epsilon = max(epsilon, self.epsilon or 0.0)


class _Reading:
    """Goes through the events of a run, in order."""

    def __init__(self) -> None:
        self.rounds = self.closed = self.sent_bytes = 0
        self.metrics: Mapping[str, float] = {}
        self.digest = ""
        self.waiting: set[str] = set()
        self._sites: dict[str, _Site] = {}
        self._awaited: set[str] = set()
        self._takes: Mapping[str, Callable[[Event], None]] = {
            "run.started": self._started,
            "sites.awaited": self._sites_awaited,
            "site.agreed": self._agreed,
            "site.refused": self._site_refused,
            "round.started": self._round_started,
            "reply.accepted": self._accepted,
            "reply.refused": self._refused,
            "reply.late": self._late,
            "counts.refused": self._counts_refused,
            "model.evaluated": self._evaluated,
            "round.closed": self._closed,
            "run.resumed": self._stopped,
            "run.failed": self._stopped,
        }

    def take(self, event: Event) -> None:
        take = self._takes.get(event["event"])
        if take is not None:
            take(event)

    def site(self, name: str) -> _Site:
        return self._sites.setdefault(name, _Site())

    def status(self) -> list[SiteStatus]:
        never = Incident("absent", 0, "", "it has not agreed to the run yet")
        return [
            SiteStatus(
                name,
                rounds=len(site.rounds),
                seen=site.seen,
                version=site.version,
                late=len(site.missed["late"]),
                refused=len(site.missed["refused"]),
                absent=len(site.missed["absent"]),
                last=never if site.last is None and name in self._awaited else site.last,
                epsilon=site.epsilon,
                budget_left=site.budget_left,
                received_bytes=site.received_bytes,
            )
            for name, site in sorted(self._sites.items())
        ]

    def _started(self, event: Event) -> None:
        self.rounds = event["rounds"]
        for name in event["sites"]:
            self.site(name)

    def _sites_awaited(self, event: Event) -> None:
        self._awaited = set(event["sites"])
        for name in self._awaited:
            self.site(name)

    def _agreed(self, event: Event) -> None:
        site = self._seen(event)
        self._awaited.discard(event["site"])
        site.version = event.get("version", "")
        site.budget_left = event.get("budget_left")

    def _site_refused(self, event: Event) -> None:
        if event["code"] not in NOT_HEARD:  # else it is offered the run again
            self._seen(event).miss(Incident("refused", 0, event["code"], event["why"]))

    def _round_started(self, event: Event) -> None:
        self.waiting = set(event["cohort"])
        for name in event.get("absent", ()):
            self.site(name).miss(Incident("absent", event["round"], "", "it was not online"))

    def _accepted(self, event: Event) -> None:
        site = self._seen(event)
        site.received_bytes += event["bytes"]
        site.spent(event["epsilon"])
        self.waiting.discard(event["site"])

    def _refused(self, event: Event) -> None:
        code = event["code"]
        site = self.site(event["site"]) if code in NOT_HEARD else self._seen(event)
        late = code == _NO_REPLY
        kind: Literal["late", "refused"] = "late" if late else "refused"
        site.miss(Incident(kind, event["round"], code, event["why"]))
        self.waiting.discard(event["site"])

    def _late(self, event: Event) -> None:
        # The round that it missed has been counted, with its reason, when its deadline passed.
        self._seen(event)

    def _counts_refused(self, event: Event) -> None:
        why = f"its counts: {event['why']}"
        self._seen(event).miss(Incident("refused", event["round"], event["code"], why))

    def _evaluated(self, event: Event) -> None:
        self.metrics = event["metrics"]

    def _stopped(self, event: Event) -> None:
        del event
        self.waiting = set()

    def _closed(self, event: Event) -> None:
        self.closed = event["round"]
        self.rounds = event["rounds"]
        self.digest = event["digest"]
        self.sent_bytes += event.get("sent_bytes", 0)
        self.waiting = set()
        for name in event["sites"]:
            self.site(name).rounds.add(event["round"])

    def _seen(self, event: Event) -> _Site:
        site = self.site(event["site"])
        site.seen = event["time"]
        return site


def _finished(run: RunFolder) -> State:
    return "exported" if run.bundle.exists() else "finished"


def _between(began: str, newest: str) -> float:
    if not began:
        return 0.0
    passed = datetime.fromisoformat(newest) - datetime.fromisoformat(began)
    return round(passed.total_seconds(), 3)

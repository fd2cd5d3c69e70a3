"""The sites of one run: who is of the roster, online, and has agreed.

Every site gets the offer once it is online, and nobody waits for its answer; one that comes later,
or comes back, takes part from the next round on. A site that refuses is asked no more in this run,
and its reason is recorded; one that only waits for a key or a roster to be put in place is asked
again after a while.

The roster may change meanwhile. Who is taken off is asked no more; who has new keys is offered the
run again; a new name takes part from the next run on, as the others agreed to this one without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from lepton_fed.config.agreement import Agreement
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Ask, Offer, OfferReply, PhaseAsk, PhaseReply, Reply
from lepton_fed.core.pace import Deadline
from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.events import EventLog
from lepton_fed.server.rounds import Late

__all__ = ["Federation", "Line", "RosterChange"]

_LOOK_S = 0.5
_AGAIN_S = 10.0
_OFFER_LOOK_S = 0.1
_OFFER_S = 60.0  # then it is offered again: a site that reads its data first has it by then


class Line(Protocol):
    """What reaches the sites; see :class:`lepton_fed.flower.transport.GridTransport`."""

    def sites(self) -> Sequence[str]:
        """Return the names of the sites that are online."""

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        """Ask sites and yield their replies."""

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        """Ask sites for a phase of secure aggregation and yield their replies."""

    def offer(self, offers: Mapping[str, Offer], limit_s: float) -> None:
        """Offer sites a run and go on."""

    def offer_replies(self) -> list[OfferReply]:
        """Return what sites said to offers since the last time, and who did not in time."""

    def take_late(self) -> Sequence[Late]:
        """Return the replies that came too late."""


@dataclass(frozen=True)
class RosterChange:
    """What a new roster changes.

    Args:
        roster: The signed roster, as the file holds it.
        version: Its version.
        sites: Names of all sites on it.
        removed: Names that are on it no more.
        renewed: Names that have other keys.
        added: Names that were not on it.
    """

    roster: bytes
    version: int
    sites: tuple[str, ...]
    removed: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


class Federation:
    """Reaches the sites that agreed; a transport for the round loop.

    Args:
        line: Reaches all sites.
        agreement: What they are to agree to.
        roster: The signed roster, as the file holds it.
        names: Names of all sites of the roster as it is now.
        quorum: Smallest number of sites that a round takes.
        gather_s: Seconds to wait for the others before the first round, and for the quorum
            before any.
        log: The run's event log.
        sleep: Waits, seconds.
        clock: Tells seconds that never go back.
        of_run: Names of the sites that may take part, of a run that goes on; None for all.
    """

    def __init__(
        self,
        line: Line,
        agreement: Agreement,
        roster: bytes,
        names: Sequence[str],
        quorum: int,
        gather_s: float,
        log: EventLog,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        of_run: Collection[str] | None = None,
    ) -> None:
        self._line = line
        self._agreement = agreement.digest
        self._masked = agreement.privacy.secure_aggregation.enabled
        self._offer = Offer(canonical_json(agreement), roster)
        self._of_run = tuple(sorted(names if of_run is None else of_run))
        self._names = tuple(name for name in self._of_run if name in names)
        self._quorum = quorum
        self._gather_s = gather_s
        self._log = log
        self._sleep = sleep
        self._clock = clock
        self._offered: set[str] = set()  # and have not answered yet
        self._agreed: set[str] = set()
        self._refused: set[str] = set()
        self._again: dict[str, float] = {}  # when they are asked again that may soon agree
        self._why: dict[str, str] = {}  # code that was told last of each of them
        self._changes: SimpleQueue[RosterChange] = SimpleQueue()
        self._missing: tuple[str, ...] | None = None

    def renew(self, change: RosterChange) -> None:
        """Go by another roster from the next look on; called from any thread."""
        self._changes.put(change)

    def gather(self, wanted: Collection[str] = ()) -> None:
        """Wait until every site has answered the offer, or the quorum has and time is up.

        Args:
            wanted: Names of the sites to wait for, when not for all of the roster.

        Raises:
            RunError: LF5004, the quorum was not reached in time; LF5005, too many sites refused.
        """
        until = self._clock() + self._gather_s
        waiting = set(wanted or self._names)
        while waiting:
            self._meet()
            self._note_missing()
            waiting &= set(self._names) - self._agreed - self._refused - self._again.keys()
            if not waiting or self._clock() >= until:
                break
            self._nap()
        self._require(len(self._agreed))

    def sites(self) -> Sequence[str]:
        """Return the names of the sites that agreed and are online; wait for the quorum.

        Raises:
            RunError: LF5004, the quorum is not online in time; LF5005, too many sites refused.
        """
        until = self._clock() + self._gather_s
        while True:
            online = self._meet()
            ready = sorted(self._agreed & online)
            if len(ready) >= self._quorum:
                return ready
            if self._clock() >= until or len(self._possible()) < self._quorum:
                self._require(len(ready))
            self._note_missing()
            self._nap()

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        """Ask sites and yield their replies."""
        return self._line.exchange(asks, deadline)

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        """Ask sites for a phase of secure aggregation and yield their replies."""
        return self._line.phase(asks, deadline, answer_bytes)

    def take_late(self) -> Sequence[Late]:
        """Return the replies that came too late."""
        return self._line.take_late()

    def _nap(self) -> None:
        self._sleep(_OFFER_LOOK_S if self._offered else _LOOK_S)

    def _meet(self) -> set[str]:
        """Offer the run to who is online and was not asked yet; return who is online."""
        while not self._changes.empty():
            self._take(self._changes.get())
        online = set(self._line.sites()) & set(self._names)
        now = self._clock()
        early = {name for name, when in self._again.items() if now < when}
        self._offered &= online  # one that goes away and comes back may have lost it
        new = sorted(online - self._agreed - self._refused - self._offered - early)
        if new:
            self._line.offer(dict.fromkeys(new, self._offer), _OFFER_S)
            self._offered |= set(new)
        for reply in self._line.offer_replies():
            self._offered.discard(reply.site)
            if reply.site in self._names and reply.site not in self._agreed:
                self._hear(reply)
        return online

    def _take(self, change: RosterChange) -> None:
        """Go by another roster: what sites with other keys said before counts no more."""
        self._offer = Offer(self._offer.agreement, change.roster)
        others = {*change.removed, *change.renewed}
        self._names = tuple(name for name in self._of_run if name in change.sites)
        if self._masked:  # every site has to go by the same roster: all are offered the run again
            others = set(self._of_run)
        self._agreed -= others
        self._refused -= others
        self._offered -= others
        self._again.clear()  # it may be the one that they waited for
        self._log.emit(
            "roster.changed",
            version=change.version,
            removed=list(change.removed),
            renewed=list(change.renewed),
            added=list(change.added),
        )

    def _hear(self, reply: OfferReply) -> None:
        problem = reply.refusal
        if problem is None and reply.agreement != self._agreement:
            problem = Problem("LF4413", "it agreed to something else", where=reply.site)
        self._again.pop(reply.site, None)
        if problem is None:
            self._agreed.add(reply.site)
            self._why.pop(reply.site, None)
            self._log.emit(
                "site.agreed",
                site=reply.site,
                version=reply.version,
                budget_left=reply.budget_left,
            )
            return
        if problem.code in _SOON:
            self._again[reply.site] = self._clock() + _AGAIN_S
            if self._why.get(reply.site) == problem.code:
                return  # told before, and nothing has changed
            self._why[reply.site] = problem.code
        elif problem.code not in _NOT_HEARD:  # it may have been restarted in between: ask again
            self._refused.add(reply.site)
        self._log.emit("site.refused", site=reply.site, code=problem.code, why=problem.what)

    def _note_missing(self) -> None:
        answered = self._agreed | self._refused | self._again.keys()
        missing = tuple(name for name in self._names if name not in answered)
        if missing and missing != self._missing:
            self._log.emit("sites.awaited", sites=list(missing), agreed=sorted(self._agreed))
        self._missing = missing

    def _possible(self) -> list[str]:
        return [name for name in self._names if name not in self._refused]

    def _require(self, ready: int) -> None:
        if ready >= self._quorum:
            return
        if len(self._possible()) < self._quorum:
            refused = ", ".join(sorted(self._refused))
            raise RunError(
                Problem("LF5005", f"{len(self._refused)} of {len(self._names)} sites refused the "
                        f"run, the quorum is {self._quorum}", key="rounds.quorum",
                        remedy=f"the event log says why these sites refused: {refused}")
            )  # fmt: skip
        absent = ", ".join(n for n in self._names if n not in self._agreed) or "none"
        raise RunError(
            Problem("LF5004", f"{ready} sites are ready, the quorum is {self._quorum}",
                    key="rounds.quorum", remedy=f"start these sites, or look at what they "
                    f"refused: {absent}")
        )  # fmt: skip


_NOT_HEARD = frozenset({"LF5303", "LF5304", "LF5306"})
# Somebody is changing a key or a roster, at the site or here, and is not done yet.
_SOON = frozenset({"LF4175", "LF4176", "LF4414", "LF4512"})

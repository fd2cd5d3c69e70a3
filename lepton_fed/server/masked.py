"""A round's sum by secure aggregation, as the coordinator has it made: phase after phase.

The coordinator routes what sites say to each other, adds what they masked, and opens the sum. What
it has of a phase is on disk before the next one is asked, so that a restart goes on with the same
cohort and the same survivors. An attempt that fails before any share was asked for is made again
without the sites that were named; they mask the vectors that they have stored, under other keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from lepton_fed.config.agreement import Agreement
from lepton_fed.core.exchange import Ask, Phase, PhaseAsk, PhaseReply, ask_digest, legible
from lepton_fed.core.pace import Deadline
from lepton_fed.core.ring import RingEncoding
from lepton_fed.core.seeds import generator
from lepton_fed.errors import Problem
from lepton_fed.identity.signature import PublicKey
from lepton_fed.privacy.client import client_noise, honest_sites
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.privacy.masked_plan import (
    Shape,
    context_of,
    masked_layout,
    roster_digest,
    serial_of,
)
from lepton_fed.privacy.secagg.collector import Collector, TooFew
from lepton_fed.privacy.secagg.member import Rules
from lepton_fed.privacy.secagg.messages import (
    Advert,
    Confirmation,
    Envelope,
    FalseMessage,
    Reveal,
)
from lepton_fed.privacy.secagg.packing import packed_bytes
from lepton_fed.privacy.secagg.requests import (
    AdvertReply,
    AdvertRequest,
    ConfirmReply,
    ConfirmRequest,
    MaskRequest,
    RevealReply,
    RevealRequest,
    ShareReply,
    ShareRequest,
    packed_body,
    read_body,
)
from lepton_fed.privacy.secagg.vector import MaskedLayout
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.groups import Group, GroupFiles, GroupSum

__all__ = ["MaskedRounds", "PhaseTransport"]

_MOST_ATTEMPTS = 3
_NO_REPLY = "LF5306"
_SLOW_BYTES_PER_S = 1e6


class _Accused(Exception):
    """A sum has a site in it that others say sent them something false."""


class PhaseTransport(Protocol):
    """Carries phases to sites and their replies back."""

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        """Ask sites and yield their replies as they come, each site's at most once."""


@dataclass(frozen=True)
class _Round:
    """The round that goes on."""

    ask: Ask
    serial: int
    layout: MaskedLayout
    keys: Mapping[str, PublicKey]
    roster: str
    subject: str


class MaskedRounds:
    """Has the sums of a run made.

    Args:
        agreement: What the sites agreed to.
        shape: What an update is made of.
        folder: The run's folder.
        log: Its event log.
        keys: Tells the public identity key of every site of the roster, by name.
        quorum: Fewest sites in all groups together.
        patience: How many times as long as expected sites have to answer; None waits.
    """

    def __init__(
        self,
        agreement: Agreement,
        shape: Shape,
        folder: RunFolder,
        log: EventLog,
        keys: Callable[[], Mapping[str, PublicKey]],
        *,
        quorum: int = 1,
        patience: float | None = None,
    ) -> None:
        self._agreement = agreement
        self._secure = agreement.privacy.secure_aggregation
        self._rules = Rules(
            self._secure.min_cohort, self._secure.threshold, self._secure.post_quantum
        )
        noise = shared_noise(agreement, shape.size)
        self._least = max(
            self._secure.least_sites() // self._secure.groups,
            noise.honest if noise else 0,
            honest_sites(agreement),
        )
        self._shape = shape
        self._folder = folder
        self._log = log
        self._keys = keys
        self._quorum = quorum
        self._patience = patience
        self._adverts: dict[str, Advert] = {}

    @property
    def encoding(self) -> RingEncoding:
        """Return how coordinates are encoded."""
        return masked_layout(self._agreement, self._shape, train=True, evaluate=False).encoding

    def tell(self, *, evaluate: bool) -> None:
        """Write down how the sums of the run are made."""
        layout = masked_layout(self._agreement, self._shape, train=True, evaluate=evaluate)
        encoding, aggregation = layout.encoding, self._agreement.task.aggregation
        client = client_noise(self._agreement, self._shape.size)
        one = 1.0 if aggregation.weight == "rows" else aggregation.weight_bound
        self._log.emit(
            "secagg.planned",
            bits=encoding.bits,
            grid=client.shares.grid if client and client.shares else encoding.grid,
            words=layout.words,
            bytes=packed_bytes(layout.words, encoding.bits),
            cohort=encoding.cohort,
            min_cohort=self._secure.min_cohort,
            groups=self._secure.groups,
            post_quantum=self._secure.post_quantum,
            most_bits_lost_to_weight=round(encoding.bits_lost_to_weight(one), 1),
            unchecked="norms and ranges are checked by each site alone: a malicious site can move "
            "a sum as far as the ring reaches",
        )

    def sums(
        self,
        transport: PhaseTransport,
        ask: Ask,
        cohort: Sequence[str],
        deadline: Deadline | None,
        answered: Callable[[str], None],
    ) -> list[GroupSum]:
        """Have the sums of a round made, one of each group.

        Args:
            transport: Reaches the sites.
            ask: What is asked of each.
            cohort: Names of the sites.
            deadline: Tells when a site that trains is given up; None waits.
            answered: Told of each site that has trained, or was waited for in vain.

        Returns:
            Those that could be opened; none when they are of fewer sites than the quorum.
        """
        about = self._about(ask)
        groups = self._groups(about, cohort)
        pending = groups
        for left in reversed(range(_MOST_ATTEMPTS)):
            for group in pending:
                self._begin(about, group)
            self._bring(transport, about, groups, deadline, answered, last=left == 0)
            before, about = about, self._about(ask)
            failed = [group for group in groups if group.why]
            if before.roster != about.roster:
                pending = [group for group in failed if group.under(about.keys, self._least)]
            else:
                pending = [group for group in failed if group.again(self._least)]
            if not pending:
                break
        return [group.sum for group in groups if group.sum is not None]

    def forget(self) -> None:
        """Remove what is on disk of the round: it is over."""
        GroupFiles(self._folder.masked).remove()

    # --- a round

    def _about(self, ask: Ask) -> _Round:
        serial = serial_of(self._agreement, ask.round_number, train=ask.train)
        layout = masked_layout(self._agreement, self._shape, train=ask.train, evaluate=ask.evaluate)
        keys = dict(self._keys())
        return _Round(ask, serial, layout, keys, roster_digest(keys), ask_digest(ask))

    def _groups(self, about: _Round, cohort: Sequence[str]) -> list[Group]:
        """Return the groups as another process left them, and those that it had not come to."""
        saved = self._saved(about)
        if len(saved) == self._secure.groups:
            return saved
        numbers = {group.number for group in saved}
        taken = {name for group in saved for name in group.names}
        for group in self._grouped(about, cohort):
            if group.number not in numbers:
                # Of another cohort than that process had, some may be in a group already.
                group.names = tuple(name for name in group.names if name not in taken)
                saved.append(group)
        return sorted(saved, key=lambda group: group.number)

    def _grouped(self, about: _Round, cohort: Sequence[str]) -> list[Group]:
        """Return the cohort in groups, drawn from the run's seed; none when it is too small."""
        number = self._secure.groups
        if len(cohort) < number * self._least:
            self._log.emit(
                "secagg.abandoned",
                round=about.ask.round_number,
                attempt=1,
                group=0,
                phase="advertise",
                why=f"{len(cohort)} sites are there, {number * self._least} are needed",
            )
            return []
        names = sorted(cohort)
        if number > 1:
            generator(self._agreement.seed, "groups", round_number=about.serial).shuffle(names)
        return [Group(at + 1, tuple(sorted(names[at::number]))) for at in range(number)]

    def _begin(self, about: _Round, group: Group) -> None:
        if group.collector is not None and not group.why:
            return  # it goes on where another process was
        group.collector, group.stage, group.why = self._collector(about, group), "advertise", ""

    def _collector(self, about: _Round, group: Group) -> Collector:
        context = context_of(
            self._agreement,
            self._shape,
            about.layout,
            about.roster,
            serial=about.serial,
            attempt=group.attempt,
        )
        encoding = about.layout.encoding
        return Collector(
            context,
            about.keys,
            about.layout.words,
            encoding.bits,
            post_quantum=self._secure.post_quantum,
            subject=about.subject,
        )

    def _survivors(self, group: Group, *, last: bool) -> Sized:
        """Close the masked vectors, unless the sum is better made again.

        Raises:
            TooFew: They are fewer than the threshold.
            _Accused: Two sites or more say that one in the sum sent them something false. Nothing
                is revealed yet, so they can be in a sum themselves, without it. There are enough
                for that: at least two come for one that goes.
        """
        survivors = group.open.close_masked()
        accused = group.believed.intersection(survivors)
        if accused and not last:
            raise _Accused(f"two sites or more accuse {', '.join(sorted(accused))}")
        return survivors

    def _bring(
        self,
        transport: PhaseTransport,
        about: _Round,
        groups: Sequence[Group],
        deadline: Deadline | None,
        answered: Callable[[str], None],
        *,
        last: bool,
    ) -> None:
        """Bring groups through their phases, all of them side by side."""
        self._advertise(transport, about, groups)
        self._share(transport, about, groups, deadline, answered)
        self._mask(transport, about, groups, last=last)
        came = sum(len(group.open.survivors) for group in groups if not group.why)
        for group in _at(groups, "confirm"):
            if came < self._quorum:
                self._fail(about, group, f"{came} sites are left, the quorum is {self._quorum}")
        self._confirm(transport, about, groups)
        self._reveal(transport, about, groups)

    # --- the phases

    def _advertise(self, transport: PhaseTransport, about: _Round, groups: Sequence[Group]) -> None:
        """Gather the adverts that did not come with the round before; form the cohorts."""
        waiting = _at(groups, "advertise")
        body = packed_body(AdvertRequest(about.roster))
        asks: dict[str, PhaseAsk] = {}
        for group in waiting:
            asked = self._asked("advertise", group, body, about)
            for name in group.names:
                if not self._has_advert(group, name):
                    asks[name] = asked
        for reply, group in self._ask(transport, about, waiting, asks, self._soon(0)):
            with self._blamed(about, group, reply.site):
                advert = Advert.parse(read_body(AdvertReply, reply.body).advert)
                group.open.add_advert(reply.site, advert)
        for group in waiting:
            there = group.open.advertised
            if len(there) < max(self._least, group.threshold):
                self._fail(about, group, f"{len(there)} sites are there, {self._least} are needed")
                continue
            threshold = max(self._rules.least(len(there)), group.threshold)
            group.open.form(threshold)
            group.threshold = group.threshold or threshold
            group.names = there
            self._log.emit(
                "secagg.formed",
                round=about.ask.round_number,
                attempt=group.attempt,
                group=group.number,
                sites=list(there),
                threshold=threshold,
            )
            self._next(about, group, "share")

    def _has_advert(self, group: Group, name: str) -> bool:
        advert = self._adverts.pop(name, None)
        if advert is None:
            return False
        try:
            group.open.add_advert(name, advert)
        except FalseMessage:  # for another attempt, or under another roster
            return False
        return True

    def _share(
        self,
        transport: PhaseTransport,
        about: _Round,
        groups: Sequence[Group],
        deadline: Deadline | None,
        answered: Callable[[str], None],
    ) -> None:
        """Let the cohorts train and hand out shares."""
        waiting = _at(groups, "share")
        asks: dict[str, PhaseAsk] = {}
        for group in waiting:
            progress = group.open.progress
            request = ShareRequest(about.roster, progress.adverts, progress.threshold)
            asked = self._asked("share", group, packed_body(request), about, with_model=True)
            asks |= dict.fromkeys(group.names, asked)
        replies = self._ask(transport, about, waiting, asks, deadline, late=answered)
        for reply, group in replies:
            with self._blamed(about, group, reply.site):
                made = read_body(ShareReply, reply.body).envelopes
                envelopes = [Envelope.parse(envelope) for envelope in made]
                group.open.add_envelopes(reply.site, envelopes)
                answered(reply.site)
        for group in waiting:
            self._close(about, group, group.open.close_envelopes, "mask")

    def _mask(
        self, transport: PhaseTransport, about: _Round, groups: Sequence[Group], *, last: bool
    ) -> None:
        """Add up the masked vectors."""
        waiting, asks = _at(groups, "mask"), {}
        for group in waiting:
            for name in group.open.senders:
                envelopes = [e.wire() for e in group.open.envelopes_for(name)]
                body = packed_body(MaskRequest(about.roster, envelopes, list(group.open.senders)))
                asks[name] = self._asked("mask", group, body, about)
        size = packed_bytes(about.layout.words, about.layout.encoding.bits)
        for reply, group in self._ask(transport, about, waiting, asks, self._soon(size), size):
            with self._blamed(about, group, reply.site):
                if reply.masked is None:
                    raise FalseMessage(reply.site, "no masked vector")
                group.open.add_masked(reply.site, reply.masked)
        for group in waiting:
            self._close(about, group, partial(self._survivors, group, last=last), "confirm")

    def _confirm(self, transport: PhaseTransport, about: _Round, groups: Sequence[Group]) -> None:
        """Have the survivors sign who is in the sum."""
        asks: dict[str, PhaseAsk] = {}
        waiting = _at(groups, "confirm")
        for group in waiting:
            body = packed_body(ConfirmRequest(about.roster, list(group.open.survivors)))
            asks |= dict.fromkeys(group.open.survivors, self._asked("confirm", group, body, about))
        for reply, group in self._ask(transport, about, waiting, asks, self._soon(0)):
            with self._blamed(about, group, reply.site):
                wire = read_body(ConfirmReply, reply.body).confirmation
                group.open.add_confirmation(reply.site, Confirmation.parse(wire))
        for group in waiting:
            self._close(about, group, group.open.close_confirmations, "reveal")

    def _reveal(self, transport: PhaseTransport, about: _Round, groups: Sequence[Group]) -> None:
        """Gather the shares that take the masks off, and the adverts of the next round."""
        asks: dict[str, PhaseAsk] = {}
        waiting = _at(groups, "reveal")
        for group in waiting:
            progress = group.open.progress
            request = RevealRequest(
                about.roster,
                progress.survivors,
                list(group.open.dropped),
                progress.confirmations,
                self._has_next(about),
            )
            asked = self._asked("reveal", group, packed_body(request), about)
            asks |= dict.fromkeys(progress.survivors, asked)
        for reply, group in self._ask(transport, about, waiting, asks, self._soon(0)):
            with self._blamed(about, group, reply.site):
                said = read_body(RevealReply, reply.body)
                group.open.add_reveal(reply.site, Reveal.parse(said.shares))
                if said.advert:
                    self._adverts[reply.site] = Advert.parse(said.advert)
        for group in waiting:
            self._open(about, group)

    def _open(self, about: _Round, group: Group) -> None:
        """Take the masks off a group's sum and read it."""
        layout = about.layout
        try:
            opened = layout.open(group.open.unmask())
        except TooFew as error:
            self._fail(about, group, str(error))
        except FalseMessage as error:
            self._name(about, group, error.sender, error.why)
            self._fail(about, group, f"the sum cannot be opened: {error}")
        except ValueError as error:
            self._fail(about, group, str(error))
        else:
            names = group.open.survivors
            if opened.replies != len(names):
                self._fail(about, group, f"a sum of {opened.replies}, not of {len(names)} vectors")
                return
            size = packed_bytes(layout.words, layout.encoding.bits)
            group.sum = GroupSum(group.number, names, opened, size)
            self._log.emit(
                "secagg.opened",
                round=about.ask.round_number,
                attempt=group.attempt,
                group=group.number,
                sites=list(names),
                dropped=list(group.open.dropped),
                saturated=opened.saturated,
            )

    # --- what phases have in common

    def _asked(
        self, phase: Phase, group: Group, body: bytes, about: _Round, *, with_model: bool = False
    ) -> PhaseAsk:
        ask = about.ask if with_model else replace(about.ask, vectors={}, limit_s=0.0)
        return PhaseAsk(phase, group.attempt, body, ask)

    def _ask(
        self,
        transport: PhaseTransport,
        about: _Round,
        groups: Sequence[Group],
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None,
        answer_bytes: int = 0,
        late: Callable[[str], None] = lambda site: None,
    ) -> Iterator[tuple[PhaseReply, Group]]:
        """Ask, and yield the replies that are of use, each with its site's group."""
        if not asks:
            return
        of = {name: group for group in groups for name in group.names}
        heard: set[str] = set()
        for reply in transport.phase(asks, deadline, answer_bytes):
            site, problem = reply.site, reply.refusal
            if site not in asks:
                problem = Problem("LF4407", "it was not asked")
            elif site in heard:
                problem = Problem("LF4410", "a second reply to one ask")
            heard.add(site)
            if problem is None:
                yield reply, of[site]
                continue
            self._refused(about, site, problem)
            if problem.code == _NO_REPLY and site in asks:
                late(site)
            # Only in these does a site use what others made; what it says of others is its word.
            if problem is reply.refusal and asks[site].phase in ("share", "mask"):
                of[site].accuse(reply.accused, by=site)

    @contextmanager
    def _blamed(self, about: _Round, group: Group, site: str) -> Iterator[None]:
        """Name who sent something false, and go on without it."""
        try:
            yield
        except FalseMessage as error:
            self._name(about, group, error.sender or site, error.why)

    def _name(self, about: _Round, group: Group, site: str, why: str) -> None:
        group.named.add(site)
        self._refused(about, site, Problem("LF4415", legible(why, 200)))

    def _refused(self, about: _Round, site: str, problem: Problem) -> None:
        self._log.emit(
            "reply.refused",
            round=about.ask.round_number,
            site=site,
            code=problem.code,
            why=problem.what,
        )

    def _close(self, about: _Round, group: Group, close: Callable[[], Sized], stage: Phase) -> None:
        """Close a phase, and go on to the next with who is left."""
        try:
            left = len(close())
        except (TooFew, _Accused) as error:
            self._fail(about, group, str(error))
            return
        # Of the last phase the threshold alone decides: the sum is as large as it is.
        if stage != "reveal" and left < self._least:
            self._fail(about, group, f"{left} sites are left, {self._least} are to be in a sum")
            return
        self._next(about, group, stage)

    def _fail(self, about: _Round, group: Group, why: str) -> None:
        group.why = why
        self._log.emit(
            "secagg.abandoned",
            round=about.ask.round_number,
            attempt=group.attempt,
            group=group.number,
            phase=group.stage,
            why=why,
        )

    def _soon(self, size: int) -> Deadline | None:
        """Return the deadline of a phase in which nobody trains; of each site come that bytes."""
        if self._patience is None:
            return None
        return Deadline(self._patience, 1, 0.0, 2 * size / _SLOW_BYTES_PER_S)

    def _has_next(self, about: _Round) -> bool:
        last = self._agreement.rounds + about.ask.evaluate
        return about.serial < last

    # --- over a restart

    def _next(self, about: _Round, group: Group, stage: Phase) -> None:
        """Write down that a group goes on to a phase, before anybody is asked for it."""
        group.stage = stage
        GroupFiles(self._folder.masked).save(about.serial, about.roster, group)

    def _saved(self, about: _Round) -> list[Group]:
        """Return the groups as another process left them; none when it had not begun."""
        found = []
        for saved in GroupFiles(self._folder.masked).load(about.serial):
            group = saved.group
            if saved.roster != about.roster:  # nothing of it is signed for the roster of now
                group.attempt += 1
            else:
                collector = self._collector(about, group)
                try:
                    collector.resume(saved.progress, saved.envelopes.items(), saved.total)
                    group.collector = collector
                except ValueError:
                    continue  # sites say again what they said, or that this lies behind
            found.append(group)
        return found


def _at(groups: Iterable[Group], *stages: Phase) -> list[Group]:
    """Return the groups that have come to one of these phases, and no further."""
    return [g for g in groups if not g.why and g.sum is None and g.stage in stages]

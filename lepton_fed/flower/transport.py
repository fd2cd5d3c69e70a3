"""Asks and replies over a Flower Grid, in terms of sites' names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lepton_fed.core.exchange import (
    Ask,
    Offer,
    OfferReply,
    PhaseAsk,
    PhaseReply,
    PushReply,
    PushStep,
    Reply,
    legible,
)
from lepton_fed.core.pace import Deadline
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.compat import COORDINATOR_NODE, MALFORMED
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.flower.records import (
    ask_to_record,
    offer_to_record,
    phase_reply_to_record,
    phase_to_record,
    push_to_record,
    record_to_ask,
    record_to_offer_reply,
    record_to_phase,
    record_to_phase_reply,
    record_to_push_reply,
    record_to_reply,
    reply_to_record,
)
from lepton_fed.flower.seal import COORDINATOR, Sealing, contents_digest, new_nonce
from lepton_fed.identity.signature import PrivateKey, PublicKey

__all__ = [
    "SITE",
    "Channel",
    "GridTransport",
    "Late",
    "Seals",
    "client_app",
    "run_in_process",
    "server_app",
]

SITE = "site"
"""Key of a node's config that holds the site's name."""

_FIRST_POLL_S = 0.02
_MOST_POLL_S = 0.5
_POLL_SHARE = 0.02  # of the time that was waited already: that late, at most, a reply is noticed
_CLOCKS_APART_S = 310.0  # Flower's node authentication bears 305 s between two clocks

Result = TypeVar("Result")


class Channel(Protocol):
    """Carries messages to nodes; replies come one at a time, and only one is held."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are online."""

    def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> Iterable[str]:
        """Put messages out and return their ids; larger answers than are sent are announced."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies to these messages that are here."""

    def drop_messages(self, message_ids: Iterable[str]) -> Iterable[str]:
        """Drop the replies to these messages that are here; return the ids of the messages."""


@dataclass(frozen=True)
class Seals:
    """The keys of a federation, as the coordinator holds them.

    Args:
        key: The coordinator's own.
        sites: Public key of each site, by name.
    """

    key: PrivateKey
    sites: Mapping[str, PublicKey]


@dataclass(frozen=True)
class Late:
    """A reply that came after its deadline and was dropped.

    Args:
        site: Name of the site.
        round_number: Round that it was asked in; 0 outside rounds.
    """

    site: str
    round_number: int


class GridTransport:
    """Asks sites over a Grid and hands their replies on as they come, one at a time.

    A reply counts only from the site it was asked of: it is matched by the id of the message it
    answers, never by what it says of itself, and on a network by the seal of that site over the
    nonce that it was sent.

    Args:
        grid: Carries the messages.
        nodes: Node id of each site, by name.
        sleep: Waits between two looks for replies, seconds.
        clock: Tells seconds that never go back.
        seals: The keys; None where there is no network.
    """

    def __init__(
        self,
        grid: Channel,
        nodes: Mapping[str, int],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        seals: Seals | None = None,
    ) -> None:
        self._grid = grid
        self._members = _Members(dict(nodes), seals)
        self._sleep = sleep
        self._clock = clock
        self._offered: dict[str, tuple[_Sent, float]] = {}
        self._unoffered: list[str] = []
        self._overdue: dict[str, Late] = {}
        self._late: list[Late] = []

    def renew(self, nodes: Mapping[str, int], seals: Seals) -> None:
        """Reach these sites from now on, also from another thread in the middle of an exchange.

        What comes from then on counts under these keys only, whenever it was asked for.

        Args:
            nodes: Node id of each site, by name.
            seals: The keys.
        """
        self._members = _Members(dict(nodes), seals)  # one assignment: never half of it

    def sites(self) -> Sequence[str]:
        """Return the names of the sites that are online."""
        online = set(self._grid.get_node_ids())
        return sorted(name for name, node in self._members.nodes.items() if node in online)

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        """Ask sites and yield their replies as they come.

        A large vector of a reply may be in a file, which is removed when the next reply is taken.

        Args:
            asks: What is asked of each site, by name; the records of one ask are made once,
                however many sites it goes to, and let go of once they are sent.
            deadline: Tells when a site that has not answered is given up; None waits.
        """
        records = {id(ask): ask_to_record(ask) for ask in asks.values()}
        outgoing = {
            site: _Outgoing(
                "train" if ask.train else "evaluate", records[id(ask)], ask.round_number
            )
            for site, ask in asks.items()
        }
        del records
        for site, came in self._converse(outgoing, record_to_reply, deadline):
            yield Reply(site, refusal=came) if isinstance(came, Problem) else came

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        """Ask sites for a phase of secure aggregation and yield their replies as they come.

        Args:
            asks: What is asked of each site, by name; the records of one are made once.
            deadline: As in :meth:`exchange`.
            answer_bytes: Bytes of the masked vector that comes back.
        """
        records = {id(asked): phase_to_record(asked) for asked in asks.values()}
        outgoing = {
            site: _Outgoing("query.phase", records[id(asked)], asked.ask.round_number)
            for site, asked in asks.items()
        }
        del records
        for site, came in self._converse(outgoing, record_to_phase_reply, deadline, answer_bytes):
            yield PhaseReply(site, refusal=came) if isinstance(came, Problem) else came

    def offer(self, offers: Mapping[str, Offer], limit_s: float) -> None:
        """Offer sites a run and go on; what they say is for :meth:`offer_replies`.

        Args:
            offers: What each site is offered, by name.
            limit_s: Seconds after which a site that has not answered is given up.
        """
        outgoing = {n: _Outgoing("query.offer", offer_to_record(o)) for n, o in offers.items()}
        sent, unsent = self._send(outgoing, Deadline(1.0, len(offers), limit_s))
        until = self._clock() + limit_s
        self._offered |= {message_id: (each, until) for message_id, each in sent.items()}
        self._unoffered += unsent

    def offer_replies(self) -> list[OfferReply]:
        """Return what sites said to offers since the last time; who did not say it in time, too."""
        found = [
            OfferReply(site, refusal=Problem("LF5304", "the offer could not be sent", where=site))
            for site in self._unoffered
        ]
        self._unoffered = []
        for message in self._grid.pull_messages(list(self._offered)):
            offered = self._offered.pop(message.metadata.reply_to_message_id, None)
            if offered is None:
                continue
            sent, _ = offered
            came = self._read(message, sent, record_to_offer_reply)
            found.append(OfferReply(sent.site, refusal=came) if isinstance(came, Problem) else came)
        now = self._clock()
        for message_id in [key for key, (_, until) in self._offered.items() if now >= until]:
            sent, _ = self._offered.pop(message_id)
            self._overdue[message_id] = Late(sent.site, sent.round_number)
            late = Problem("LF5306", "no reply in time", where=sent.site)
            found.append(OfferReply(sent.site, refusal=late))
        return found

    def push(
        self, steps: Mapping[str, PushStep], deadline: Deadline | None = None
    ) -> Iterator[PushReply]:
        """Hand sites a step of a push and yield what they say as it comes.

        Args:
            steps: The step for each site, by name.
            deadline: As in :meth:`exchange`.
        """
        outgoing = {n: _Outgoing("query.push", push_to_record(s)) for n, s in steps.items()}
        for site, came in self._converse(outgoing, record_to_push_reply, deadline):
            yield PushReply(site, refusal=came) if isinstance(came, Problem) else came

    def take_late(self) -> list[Late]:
        """Return the replies that came too late since the last time; they were dropped."""
        late, self._late = self._late, []
        return late

    def _converse(
        self,
        outgoing: dict[str, _Outgoing],
        read: Callable[[str, RecordDict], Result],
        deadline: Deadline | None,
        answer_bytes: int = 0,
    ) -> Iterator[tuple[str, Result | Problem]]:
        """Send messages and yield what each site says, or why nothing of use came from it."""
        started = self._clock()
        waiting, unsent = self._send(outgoing, deadline, answer_bytes)
        outgoing.clear()  # the model in it is put out, and a copy less from here on
        for site in unsent:
            yield site, Problem("LF5304", "the ask could not be sent", where=site)
        answered: list[float] = []
        refused = len(unsent)
        while waiting:
            came_now = False
            for message in self._grid.pull_messages(list(waiting)):
                sent = waiting.pop(message.metadata.reply_to_message_id, None)
                if sent is None:
                    continue
                came_now = True
                came = self._read(message, sent, read)
                del message
                if isinstance(came, Problem) or getattr(came, "refusal", None):
                    refused += 1
                else:
                    answered.append(self._clock() - started)
                yield sent.site, came
                del came
            self._drop_late()
            if waiting and not came_now:
                elapsed = self._clock() - started
                if deadline is not None and deadline.passed(elapsed, answered, refused):
                    break
                self._sleep(min(max(_FIRST_POLL_S, _POLL_SHARE * elapsed), _MOST_POLL_S))
        for message_id, sent in waiting.items():
            self._overdue[message_id] = Late(sent.site, sent.round_number)
            yield sent.site, Problem("LF5306", "no reply in time", where=sent.site)

    def _send(
        self,
        outgoing: Mapping[str, _Outgoing],
        deadline: Deadline | None,
        answer_bytes: int = 0,
    ) -> tuple[dict[str, _Sent], list[str]]:
        ttl = None if deadline is None else deadline.allowed_s(()) + _CLOCKS_APART_S
        digests: dict[int, str] = {}
        messages, sent = [], []
        members = self._members
        gone = [site for site in outgoing if site not in members.nodes]
        for site, out in outgoing.items():
            if site in gone:
                continue
            nonce, record = "", out.record
            if members.seals is not None:
                nonce = new_nonce()
                seal = Sealing(out.purpose, COORDINATOR, site, nonce)
                if id(record) not in digests:
                    digests[id(record)] = contents_digest(record)
                record = seal.seal(record, members.seals.key, digests[id(record)])
            group = str(out.round_number)
            messages.append(
                Message(record, members.nodes[site], out.purpose, ttl=ttl, group_id=group)
            )
            sent.append(_Sent(site, out.purpose, nonce, out.round_number))
        waiting: dict[str, _Sent] = {}
        unsent = gone
        for each, pushed in zip_longest(sent, self._grid.push_messages(messages, answer_bytes)):
            if pushed:
                waiting[pushed] = each
            else:  # a Grid has no id for a message that it could not send
                unsent.append(each.site)
        return waiting, unsent

    def _read(
        self, message: Message, sent: _Sent, read: Callable[[str, RecordDict], Result]
    ) -> Result | Problem:
        if message.has_error():
            what = legible(message.error.reason or "the site's app failed", 200)
            if message.error.code == MALFORMED:
                return Problem("LF4411", what, where=sent.site)
            return Problem("LF5303", what, where=sent.site)
        try:
            content = message.content
            seals = self._members.seals
            if seals is not None:
                seal = Sealing(f"{sent.purpose} reply", sent.site, COORDINATOR, sent.nonce)
                key = seals.sites.get(sent.site)
                if key is None:
                    raise UpdateRefused(Problem("LF4414", "it was taken off the roster"))
                content = seal.check(content, key)
            return read(sent.site, content)
        except UpdateRefused as error:
            return error.problems[0]

    def _drop_late(self) -> None:
        if self._overdue:
            for message_id in self._grid.drop_messages(list(self._overdue)):
                self._late.append(self._overdue.pop(message_id))


@dataclass(frozen=True)
class _Members:
    nodes: Mapping[str, int]
    seals: Seals | None


@dataclass(frozen=True)
class _Outgoing:
    purpose: str
    record: RecordDict
    round_number: int = 0


@dataclass(frozen=True)
class _Sent:
    site: str
    purpose: str
    nonce: str
    round_number: int


def client_app(
    answer: Callable[[str, Ask], Reply], take: Callable[[str, PhaseAsk], PhaseReply] | None = None
) -> ClientApp:
    """Return a ClientApp that answers asks.

    Args:
        answer: From a site's name and an ask to its reply.
        take: From a site's name and a phase of secure aggregation to its reply.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = answer(str(context.node_config[SITE]), record_to_ask(message.content))
        return Message(reply_to_record(reply), reply_to=message)

    def handle_phase(message: Message, context: Context) -> Message:
        if take is None:
            raise TypeError("nobody here takes part in secure aggregation")
        reply = take(str(context.node_config[SITE]), record_to_phase(message.content))
        return Message(phase_reply_to_record(reply), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    app.query("phase")(handle_phase)
    return app


def server_app(run: Callable[[Grid], None]) -> ServerApp:
    """Return a ServerApp whose main function is ``run``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        run(grid)

    return app


def run_in_process(
    sites: Sequence[str],
    answer: Callable[[str, Ask], Reply],
    run: Callable[[GridTransport], Result],
    take: Callable[[str, PhaseAsk], PhaseReply] | None = None,
) -> Result:
    """Run a ServerApp against a ClientApp in this process and return what ``run`` returns.

    Args:
        sites: Names of the sites.
        answer: From a site's name and an ask to its reply.
        run: The coordinator's part, given a transport that reaches the sites.
        take: From a site's name and a phase of secure aggregation to its reply.
    """
    grid = InProcessGrid(client_app(answer, take), [{SITE: site} for site in sites])
    nodes = dict(zip(sites, grid.get_node_ids(), strict=True))
    results: list[Result] = []
    # The app is given the Grid that it is called with.
    app = server_app(lambda _: results.append(run(GridTransport(grid, nodes))))
    app(grid, Context(1, COORDINATOR_NODE, {}, RecordDict(), {}))
    return results[0]

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from lepton_fed.core.exchange import MODEL, Ask, Offer, OfferReply, Reply, Update
from lepton_fed.core.pace import Deadline
from lepton_fed.errors import DataError, Problem
from lepton_fed.flower import compat
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.flower.records import offer_reply_to_record, reply_to_record
from lepton_fed.flower.transport import SITE, GridTransport, Late, client_app, run_in_process

SITES = ["north", "south", "west"]


def ask(train: bool = True) -> Ask:
    vectors = {MODEL: np.arange(4, dtype=np.float32)}
    return Ask("agreement", "layout", 3, train, True, vectors)


def update_of(site: str) -> Reply:
    delta = np.full(4, SITES.index(site), np.float32)
    return Reply(site, update=Update("layout", {"delta": delta}, 1.0))


def exchanged(
    answer: Callable[[str, Ask], Reply], sites: Iterable[str] = SITES, asked: Ask | None = None
) -> list[Reply]:
    return run_in_process(
        SITES,
        answer,
        lambda transport: list(transport.exchange(dict.fromkeys(sites, asked or ask()))),
    )


def test_each_site_gets_the_ask_and_its_reply_comes_back_under_its_name() -> None:
    seen: dict[str, Ask] = {}

    def answer(site: str, asked: Ask) -> Reply:
        seen[site] = asked
        return update_of(site)

    replies = exchanged(answer)
    assert [reply.site for reply in replies] == SITES
    for site, reply in zip(SITES, replies, strict=True):
        assert reply.update is not None
        assert (reply.update.vectors["delta"] == SITES.index(site)).all()
        assert reply.sent_bytes == 16
        assert (seen[site].agreement, seen[site].round_number) == ("agreement", 3)
        assert seen[site].vectors[MODEL].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("train", [True, False])
def test_an_ask_to_evaluate_reaches_the_same_site(train: bool) -> None:
    def answer(site: str, asked: Ask) -> Reply:
        assert asked.train is train
        return Reply(site, counts=np.ones(2))

    replies = exchanged(answer, asked=ask(train))
    assert [reply.counts.tolist() for reply in replies if reply.counts is not None] == [[1, 1]] * 3


def test_only_the_sites_that_are_asked_answer() -> None:
    answered: list[str] = []

    def answer(site: str, asked: Ask) -> Reply:
        answered.append(site)
        return update_of(site)

    assert [reply.site for reply in exchanged(answer, ["west"])] == ["west"]
    assert answered == ["west"]
    assert exchanged(answer, []) == []


def test_a_reply_counts_for_the_site_that_was_asked_whatever_it_says() -> None:
    replies = exchanged(lambda site, asked: update_of("north"))
    assert [reply.site for reply in replies] == SITES


def test_replies_are_made_one_at_a_time_as_they_are_taken() -> None:
    made: list[str] = []
    alive: list[weakref.ref[Any]] = []

    def answer(site: str, asked: Ask) -> Reply:
        made.append(site)
        return update_of(site)

    def take(transport: GridTransport) -> None:
        for number, reply in enumerate(transport.exchange(dict.fromkeys(SITES, ask())), start=1):
            assert made == SITES[:number]
            assert reply.update is not None
            alive.append(weakref.ref(reply.update.vectors["delta"]))
            del reply
            assert sum(ref() is not None for ref in alive) <= 1

    run_in_process(SITES, answer, take)
    assert made == SITES


def test_a_site_whose_app_fails_is_a_refusal_without_its_words() -> None:
    def answer(site: str, asked: Ask) -> Reply:
        if site == "south":
            raise DataError(Problem("LF2001", "row 7 of patient Smith"))
        return update_of(site)

    replies = exchanged(answer)
    assert [reply.refusal is None for reply in replies] == [True, False, True]
    assert replies[1].refusal == Problem("LF5303", "DataError", where="south")
    assert replies[1].update is None


def test_what_run_returns_is_returned_and_what_it_raises_is_raised() -> None:
    assert run_in_process(SITES, lambda s, a: update_of(s), lambda t: t.sites()) == sorted(SITES)

    def fails(transport: GridTransport) -> None:
        raise KeyError("coordinator")

    with pytest.raises(KeyError, match="coordinator"):
        run_in_process(SITES, lambda s, a: update_of(s), fails)


class Network(InProcessGrid):
    """A Grid as a network shows it: replies late, lost, doubled, or another's."""

    def __init__(self, contents: dict[str, RecordDict | Error], late: int = 0) -> None:
        super().__init__(client_app(lambda site, asked: update_of(site)), [])
        self.sent: dict[str, Message] = {}
        self.looks = 0
        self.contents, self.late = contents, late
        self.online = [10, 11, 12]
        self.times = 1
        self.crossed = False

    def get_node_ids(self) -> list[int]:
        return self.online

    def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[str]:
        ids = super().push_messages(messages)
        self.sent = dict(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.looks += 1
        if self.looks <= self.late:
            return []
        ids = [*self.sent] if self.crossed else list(message_ids)
        return [self.reply(self.sent[i]) for i in ids for _ in range(self.times)]

    def reply(self, message: Message) -> Message:
        content = self.contents[SITES[message.metadata.dst_node_id - 10]]
        return Message(content, reply_to=message)


NODES = {site: 10 + number for number, site in enumerate(SITES)}


def contents(**others: RecordDict | Error) -> dict[str, RecordDict | Error]:
    return {site: reply_to_record(update_of(site)) for site in SITES} | others


def over(network: Network, naps: list[float] | None = None) -> Iterator[Reply]:
    def nap(seconds: float) -> None:
        assert naps is not None, "nobody should wait here"
        naps.append(seconds)
        assert len(naps) < 100

    return GridTransport(network, NODES, sleep=nap).exchange(dict.fromkeys(SITES, ask()))


def test_a_malformed_reply_is_a_refusal_and_the_others_still_come() -> None:
    broken = RecordDict({"head": ConfigRecord({"weight": True})})
    found = list(over(Network(contents(south=RecordDict(), west=broken))))
    assert [reply.site for reply in found] == SITES
    assert found[0].refusal is None
    assert found[1].refusal is not None
    assert found[1].refusal.code == "LF4411"
    assert found[2].refusal is None
    assert found[2].update is None  # neither update nor counts: the coordinator refuses it


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("node went away", "node went away"),
        (None, "the site's app failed"),
        ("", "the site's app failed"),
        ("\x1b[2J" + "x" * 9999, "?[2J" + "x" * 196),
    ],
)
def test_an_error_reply_is_a_refusal_in_few_legible_words(reason: str | None, said: str) -> None:
    found = list(over(Network(contents(south=Error(3, reason)))))
    assert found[1].refusal == Problem("LF5303", said, where="south")


def test_between_two_looks_for_replies_there_is_a_pause() -> None:
    naps: list[float] = []
    found = list(over(Network(contents(), late=7), naps))
    assert [reply.site for reply in found] == SITES
    assert len(naps) == 7
    assert all(0 < nap <= 0.05 for nap in naps)


def test_the_longer_a_reply_takes_the_less_often_is_it_looked_for() -> None:
    now, naps = [0.0], []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    network = Network(contents(), late=1500)
    transport = GridTransport(network, NODES, sleep=nap, clock=lambda: now[0])
    assert len(list(transport.exchange(dict.fromkeys(SITES, ask())))) == 3
    assert naps == sorted(naps)
    assert (naps[0], naps[-1]) == (0.02, 0.5)
    assert sum(naps) > 600


def test_a_reply_whose_parts_are_wrong_is_a_refusal_that_says_so() -> None:
    wrong = Error(compat.MALFORMED, "malformed message: an array that lacks 4 bytes")
    found = list(over(Network(contents(south=wrong))))
    assert found[1].refusal == Problem(
        "LF4411", "malformed message: an array that lacks 4 bytes", where="south"
    )


def test_a_reply_that_comes_twice_counts_once() -> None:
    network = Network(contents())
    network.times = 2
    assert [reply.site for reply in over(network)] == SITES


def test_a_reply_to_another_message_is_not_taken_for_this_one() -> None:
    network = Network(contents())
    network.crossed = True
    found = list(over(network))
    assert [reply.site for reply in found] == SITES
    assert [reply.update.vectors["delta"][0] for reply in found if reply.update] == [0, 1, 2]


@pytest.mark.parametrize("lost", [(1,), (0, 1, 2)])
def test_a_site_that_an_ask_could_not_be_sent_to_is_named(lost: tuple[int, ...]) -> None:
    class Lossy(Network):
        def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[Any]:
            ids = super().push_messages(messages)
            return [None if number in lost else i for number, i in enumerate(ids)]

    found = {reply.site: reply for reply in over(Lossy(contents()))}
    assert sorted(found) == sorted(SITES)
    for number, site in enumerate(SITES):
        refusal = found[site].refusal
        assert (refusal is not None) == (number in lost)
        assert refusal is None or refusal.code == "LF5304"


def test_when_no_ask_could_be_sent_all_sites_are_named() -> None:
    class TooLarge(Network):
        def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[str]:
            return []

    found = list(over(TooLarge(contents())))
    assert [reply.site for reply in found] == SITES
    assert {reply.refusal.code for reply in found if reply.refusal} == {"LF5304"}


def test_sites_are_those_that_are_online() -> None:
    network = Network(contents())
    transport = GridTransport(network, NODES)
    assert transport.sites() == sorted(SITES)
    network.online = [12, 99, 10]
    assert transport.sites() == ["north", "west"]


def test_a_site_learns_its_name_from_its_own_node_config() -> None:
    grid = InProcessGrid(client_app(lambda site, asked: Reply(site, counts=np.zeros(1))), [{}])
    (reply,) = GridTransport(grid, {"north": 2}).exchange({"north": ask()})
    assert reply.refusal == Problem("LF5303", "KeyError", where="north")
    assert SITE == "site"


def test_a_site_that_does_not_answer_is_given_up_after_the_patience() -> None:
    class Silent(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return []

    passed = [0.0]

    def nap(seconds: float) -> None:
        passed[0] += seconds

    grid = Silent(ClientApp(), [{}, {}])
    nodes = dict(zip(SITES, grid.get_node_ids(), strict=False))
    transport = GridTransport(grid, nodes, sleep=nap, clock=lambda: passed[0])
    replies = list(transport.exchange(dict.fromkeys(nodes, ask()), Deadline(1.0, 3, 30.0)))
    assert [(r.site, r.refusal.code) for r in replies if r.refusal] == [
        (site, "LF5306") for site in nodes
    ]
    assert 30.0 <= passed[0] < 31.0


def test_sites_can_be_asked_for_different_things() -> None:
    asks = {site: ask(train=site != SITES[0]) for site in SITES}
    seen = {}

    def answer(site: str, asked: Ask) -> Reply:
        seen[site] = asked.train
        return update_of(site)

    run_in_process(SITES, answer, lambda transport: list(transport.exchange(asks)))
    assert seen == {site: site != SITES[0] for site in SITES}


def test_a_reply_that_comes_too_late_is_dropped_and_named() -> None:
    """The first site answers its ask of round 3 only when round 4 is asked."""
    now = [0.0]
    held: dict[str, int] = {}

    class Slow(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            ready = []
            for each in message_ids:
                late = held.setdefault(each, 0) == 0 and not held.get("first")
                if late:
                    held["first"] = 1
                    held[each] = 100  # seconds from now
                if now[0] >= held[each]:
                    ready.append(each)
            return super().pull_messages(ready)

    def nap(seconds: float) -> None:
        now[0] += 1.0

    grid = Slow(client_app(lambda site, asked: update_of(site)), [{SITE: s} for s in SITES[:2]])
    nodes = dict(zip(SITES, grid.get_node_ids(), strict=False))
    transport = GridTransport(grid, nodes, sleep=nap, clock=lambda: now[0])
    first = {r.site: r for r in transport.exchange(dict.fromkeys(nodes, ask()), Deadline(1, 2, 30))}
    assert {site: reply.refusal.code for site, reply in first.items() if reply.refusal} == {
        SITES[0]: "LF5306"
    }
    assert transport.take_late() == []
    now[0] = 200.0
    second = list(transport.exchange(dict.fromkeys(nodes, ask()), Deadline(1, 2, 30)))
    assert [reply.refusal for reply in second] == [None, None]
    assert transport.take_late() == [Late(SITES[0], 3)]
    assert transport.take_late() == []


def test_offers_are_sent_and_nobody_waits_for_what_is_said_to_them() -> None:
    passed = [0.0]
    agreed = offer_reply_to_record(OfferReply("", "ab" * 32))
    network = Network(contents(**dict.fromkeys(SITES, agreed)), late=2)
    network.times = 2  # a doubled reply counts once
    transport = GridTransport(network, NODES, clock=lambda: passed[0])
    transport.offer(dict.fromkeys(SITES, Offer(b"agreement", b"roster")), 60.0)
    assert transport.offer_replies() == []
    assert transport.offer_replies() == []
    found = transport.offer_replies()
    assert sorted(reply.site for reply in found) == sorted(SITES)
    assert {reply.agreement for reply in found} == {"ab" * 32}
    assert transport.offer_replies() == []


def test_who_does_not_answer_an_offer_in_time_is_named_once() -> None:
    class Silent(Network):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return []

        def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[Any]:
            ids: list[Any] = super().push_messages(messages)
            return [None, *ids[1:]]

    passed = [0.0]
    transport = GridTransport(Silent(contents()), NODES, clock=lambda: passed[0])
    transport.offer(dict.fromkeys(SITES, Offer(b"agreement", b"roster")), 60.0)
    (unsent,) = transport.offer_replies()
    assert (unsent.site, unsent.refusal and unsent.refusal.code) == (SITES[0], "LF5304")
    passed[0] = 59.0
    assert transport.offer_replies() == []
    passed[0] = 60.0
    late = transport.offer_replies()
    assert [(r.site, r.refusal and r.refusal.code) for r in late] == [
        (site, "LF5306") for site in SITES[1:]
    ]
    assert transport.offer_replies() == []

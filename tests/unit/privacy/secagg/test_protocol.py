"""Sites and coordinator together: the sum is exact whoever drops out, whatever they forget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg import masks, packing
from lepton_fed.privacy.secagg.collector import Collector, Progress, TooFew
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.graph import Graph, Graphs
from lepton_fed.privacy.secagg.masks import words_dtype
from lepton_fed.privacy.secagg.member import Member, Rules, State
from lepton_fed.privacy.secagg.messages import FalseMessage

ROUND = Context("run", 1, 1, "roster", "task", "layout")
SIZE = 17
PHASES = ("share", "mask", "confirm", "reveal")


@dataclass
class Federation:
    """Sites that are restarted before each message, and what each has in its vector."""

    names: list[str]
    bits: int = 32
    post_quantum: bool = False
    threshold: float = 2 / 3
    graphs: Graphs = Graph.of
    states: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {name: PrivateKey.generate() for name in self.names}
        self.roster = {name: key.public_key() for name, key in self.keys.items()}
        generator = np.random.default_rng(7)
        top = 2**self.bits - 1
        self.vectors = {
            name: generator.integers(0, top, SIZE, words_dtype(self.bits), endpoint=True)
            for name in self.names
        }

    def member(self, name: str) -> Member:
        """Return a site as it is after a restart: what it remembers comes from its file."""
        content = json.dumps(asdict(self.states.get(name, State()))).encode()
        state = decode(State, strict_json(content))
        rules = Rules(3, self.threshold, self.post_quantum)
        member = Member(name, self.keys[name], self.roster, rules, state, graphs=self.graphs)
        self.states[name] = member.state
        return member

    def collector(self, context: Context) -> Collector:
        """Return a coordinator that knows nothing yet."""
        return Collector(
            context,
            self.roster,
            SIZE,
            self.bits,
            post_quantum=self.post_quantum,
            graphs=self.graphs,
        )

    def keep(self, name: str, member: Member) -> None:
        self.states[name] = member.state

    def masked(self, name: str, keys: masks.Words | object) -> npt.NDArray[np.uint8]:
        """Return a site's masked vector as it travels."""
        words = self.vectors[name].copy()
        masks.apply(words, plus=keys.plus, minus=keys.minus, bits=self.bits)  # type: ignore[attr-defined]
        return np.frombuffer(packing.pack(words, self.bits), np.uint8)

    def sum(self, names: list[str] | tuple[str, ...]) -> masks.Words:
        total = np.zeros(SIZE, dtype=words_dtype(self.bits))
        for name in names:
            total += self.vectors[name]
        return total & total.dtype.type(2**self.bits - 1)


def attempt(
    federation: Federation, context: Context, gone: Mapping[str, str]
) -> tuple[tuple[str, ...], masks.Words]:
    """Run an attempt; ``gone`` says before which phase a site is lost.

    The coordinator is another process in every phase, and in each a site says what its keys of the
    next round are.
    """

    def there(name: str, phase: str) -> bool:
        return name not in gone or PHASES.index(gone[name]) > PHASES.index(phase)

    def ask(name: str, phase: str, *request: object) -> object:
        member = federation.member(name)
        answer = getattr(member, phase)(context, *request)
        if phase != "advertise":
            member.advertise(replace(context, round_number=context.round_number + 1))
        federation.keep(name, member)
        return answer

    def restarted(before: Collector) -> Collector:
        content = json.dumps(asdict(before.progress)).encode()
        after = federation.collector(context)
        total = before.total.copy() if before.progress.survivors else None
        envelopes = json.loads(json.dumps(list(before.envelopes())))
        after.resume(decode(Progress, strict_json(content)), envelopes, total)
        return after

    collector = federation.collector(context)
    for name in federation.names:
        collector.add_advert(name, ask(name, "advertise"))  # type: ignore[arg-type]
    threshold = Rules(3, federation.threshold).least(len(federation.names))
    cohort = collector.form(threshold)
    collector = restarted(collector)
    for name in cohort.names:
        if there(name, "share"):
            collector.add_envelopes(name, ask(name, "share", cohort.adverts, threshold))  # type: ignore[arg-type]
    senders = collector.close_envelopes()
    collector = restarted(collector)
    for name in senders:
        if there(name, "mask"):
            keys = ask(name, "mask", collector.envelopes_for(name), collector.senders)
            collector.add_masked(name, federation.masked(name, keys))
    survivors = collector.close_masked()
    collector = restarted(collector)
    for name in survivors:
        if there(name, "confirm"):
            collector.add_confirmation(name, ask(name, "confirm", survivors))  # type: ignore[arg-type]
    confirmations = collector.close_confirmations()
    collector = restarted(collector)
    for name in survivors:
        if there(name, "reveal"):
            collector.add_reveal(
                name,
                ask(name, "reveal", survivors, collector.dropped, confirmations),  # type: ignore[arg-type]
            )
    return survivors, collector.unmask()


@pytest.mark.parametrize("bits", [20, 32, 64])
@pytest.mark.parametrize("post_quantum", [False, True])
def test_the_sum_is_exact(bits: int, post_quantum: bool) -> None:
    federation = Federation(list("abcde"), bits, post_quantum)
    survivors, total = attempt(federation, ROUND, {"b": "mask"})
    assert survivors == ("a", "c", "d", "e")
    np.testing.assert_array_equal(total, federation.sum(survivors))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_sum_is_that_of_those_who_stayed_whoever_drops_out(data: st.DataObject) -> None:
    names = [f"site-{number}" for number in range(data.draw(st.integers(3, 9)))]
    federation = Federation(names)
    gone = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(PHASES)))
    threshold = Rules(3, 2 / 3).least(len(names))
    left = {
        phase: [n for n in names if n not in gone or PHASES.index(gone[n]) > at]
        for at, phase in enumerate(PHASES)
    }
    enough = {"share": max(threshold, 3), "mask": max(threshold, 3)}
    if any(len(left[phase]) < enough.get(phase, threshold) for phase in PHASES):
        with pytest.raises((TooFew, FalseMessage)):
            attempt(federation, ROUND, gone)
        return
    survivors, total = attempt(federation, ROUND, gone)
    assert list(survivors) == left["mask"]
    np.testing.assert_array_equal(total, federation.sum(survivors))


def test_a_coordinator_cannot_go_on_with_survivors_and_no_sum_of_theirs() -> None:
    federation = Federation(list("abc"))
    collector = Collector(ROUND, federation.roster, SIZE)
    for name in federation.names:
        member = federation.member(name)
        collector.add_advert(name, member.advertise(ROUND))
    collector.form(2)
    progress = replace(collector.progress, survivors=["a", "b"])
    for total in (None, np.zeros(SIZE + 1, np.uint32), np.zeros(SIZE, np.uint64)):
        with pytest.raises(ValueError, match="no sum of theirs"):
            Collector(ROUND, federation.roster, SIZE).resume(progress, total=total)
    with pytest.raises(ValueError, match="cannot be among the survivors"):
        Collector(ROUND, federation.roster, SIZE).resume(progress, total=np.zeros(SIZE, np.uint32))
    with pytest.raises(ValueError, match="of other senders"):
        Collector(ROUND, federation.roster, SIZE).resume(replace(progress, senders=["a"]))


@pytest.mark.parametrize("part", ["mask", "envelope"])
@pytest.mark.parametrize("cheat", ["a", "c"])
def test_a_site_with_a_malformed_post_quantum_key_is_named(cheat: str, part: str) -> None:
    """Its advert is rightly signed; that the key is none shows when something is sealed to it."""
    federation = Federation(list("abc"), post_quantum=True)
    members = {name: federation.member(name) for name in "abc"}
    adverts = [members[name].advertise(ROUND) for name in "abc"]
    at = "abc".index(cheat)
    good = getattr(adverts[at], part)
    bad = replace(adverts[at], **{part: replace(good, kem=b"\xff" * 1184)})
    adverts[at] = bad.signed(ROUND, federation.keys[cheat])
    other = "b"
    if (part, cheat) == ("mask", "a"):  # b has the larger index, and wraps nothing for a
        members[other].share(ROUND, adverts, 2)
        return
    with pytest.raises(FalseMessage) as false:
        members[other].share(ROUND, adverts, 2)
    assert false.value.sender == cheat


NAMES = [f"site-{number:02}" for number in range(24)]


def few(sites: int, _: int) -> Graph:
    """Return a graph in which four sites may drop out, whoever they are."""
    return Graph(sites, 10, 7)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_with_few_holders_each_the_sum_is_that_of_those_who_stayed(data: st.DataObject) -> None:
    phases = st.sampled_from(PHASES)
    gone = data.draw(st.dictionaries(st.sampled_from(NAMES), phases, max_size=4))
    federation = Federation(NAMES, data.draw(st.sampled_from([20, 32, 64])), graphs=few)
    survivors, total = attempt(federation, ROUND, gone)
    assert list(survivors) == [n for n in NAMES if gone.get(n) not in ("share", "mask")]
    np.testing.assert_array_equal(total, federation.sum(survivors))


def test_with_few_holders_each_and_post_quantum_keys_the_sum_is_exact() -> None:
    """Whoever picked whom: pairs where the larger index alone did are among them."""
    federation = Federation(NAMES, post_quantum=True, graphs=few)
    gone = dict(zip(("site-00", "site-09", "site-17", "site-23"), PHASES, strict=True))
    survivors, total = attempt(federation, ROUND, gone | {"site-09": "mask", "site-17": "mask"})
    np.testing.assert_array_equal(total, federation.sum(survivors))
    picked = {
        name: {envelope["recipient"] for envelope in state.envelopes}
        for name, state in federation.states.items()
        if state.envelopes  # wiped by who revealed
    }
    assert picked["site-09"] != picked["site-17"]


@pytest.mark.slow
@pytest.mark.parametrize("post_quantum", [False, True])
def test_two_hundred_and_fifty_sites_of_which_a_tenth_drop_out(post_quantum: bool) -> None:
    names = [f"site-{number:03}" for number in range(250)]
    federation = Federation(names, post_quantum=post_quantum)
    assert not Graph.of(250, 167).is_complete
    gone = {name: PHASES[at % 4] for at, name in enumerate(names[::10])}
    survivors, total = attempt(federation, ROUND, gone)
    assert len(survivors) == 250 - 13
    np.testing.assert_array_equal(total, federation.sum(survivors))

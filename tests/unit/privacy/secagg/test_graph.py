"""Degrees and thresholds: tails against sums of fractions, and what they are to make unlikely."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.privacy.secagg import graph
from lepton_fed.privacy.secagg.graph import COMPLETE, Graph, rare
from lepton_fed.privacy.secagg.messages import Cohort
from tests.unit.privacy.secagg.test_protocol import ROUND, Federation

SIZES = (*range(201, 400, 7), 400, 500, 777, 1000, 2000)


def log_binomial(n: int, k: int) -> float:
    """Return the binary logarithm of a binomial coefficient, by the gamma function."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def log_tail(population: int, marked: int, drawn: int, hits: Iterable[int]) -> float:
    """Return the binary logarithm of the chance of some numbers of hits, in floating point."""
    logs = [
        log_binomial(marked, i)
        + log_binomial(population - marked, drawn - i)
        - log_binomial(population, drawn)
        for i in hits
        if 0 <= i <= marked and 0 <= drawn - i <= population - marked
    ]
    top = max(logs, default=-math.inf)
    return top + math.log2(sum(2 ** (x - top) for x in logs)) if logs else -math.inf


@st.composite
def draws(draw: st.DrawFn) -> tuple[int, int, int]:
    population = draw(st.integers(1, 40))
    return population, draw(st.integers(0, population)), draw(st.integers(0, population))


@given(draws(), st.integers(1, 10**6))
@settings(max_examples=200, deadline=None)
def test_rare_is_where_the_tail_of_fractions_falls_below(
    case: tuple[int, int, int], odds: int
) -> None:
    population, marked, drawn = case
    least = max(0, drawn - (population - marked))
    most = min(marked, drawn)

    def tail(hits: int) -> Fraction:
        ways = sum(
            math.comb(marked, i) * math.comb(population - marked, drawn - i)
            for i in range(hits, most + 1)
        )
        return Fraction(ways, math.comb(population, drawn))

    found = rare(population, marked, drawn, odds)
    assert tail(found) <= Fraction(1, odds)
    assert found == least or tail(found - 1) > Fraction(1, odds)


@pytest.mark.parametrize("sites", [1, 2, 3, 100, COMPLETE])
def test_up_to_two_hundred_sites_everybody_holds_shares_of_everybody(sites: int) -> None:
    assert Graph.of(sites, sites // 2 + 1) == Graph(sites, sites - 1, sites // 2 + 1)
    assert Graph.of(sites, sites).is_complete


@pytest.mark.parametrize(
    ("sites", "degree", "threshold"),
    [(201, 101, 81), (250, 118, 94), (500, 174, 137), (1000, 223, 175), (10_000, 319, 249)],
)
def test_degrees_and_thresholds_stay_as_they_are(sites: int, degree: int, threshold: int) -> None:
    """Sites of two versions that differ here could not aggregate with each other."""
    assert Graph.of(sites, sites * 2 // 3) == Graph(sites, degree, threshold)


@pytest.mark.parametrize("sites", SIZES)
def test_no_sum_of_few_sites_can_be_opened_nor_both_secrets_of_one(sites: int) -> None:
    """The module's bound for every size of a set, added up in floating point."""
    made, corrupt = Graph.of(sites, sites), sites // 3
    honest, degree, t = sites - corrupt, made.degree, made.threshold
    kept = 2 * t - degree - 2
    bits = [
        log_binomial(honest, few)
        + few * log_tail(sites - 1, corrupt + few - 1, degree, range(kept, degree + 1))
        for few in range(1, sites // 6 + 1)
    ]
    assert bits[0] <= -40 + 1e-6
    assert math.log2(sum(2**b for b in bits[1:])) <= -70
    for at_most in range(kept):  # as many corrupt holders as are not too many
        assert 2 * t > degree + 1 + at_most


@pytest.mark.parametrize("sites", SIZES)
def test_half_of_the_honest_sites_cannot_open_a_sum_of_a_sixth(sites: int) -> None:
    made, corrupt = Graph.of(sites, sites), sites // 3
    honest, degree, few = sites - corrupt, made.degree, -(-sites // 6)
    reached = range(made.threshold - 1, degree + 1)
    opens = log_tail(sites - 1, corrupt + honest // 2, degree, reached)
    assert log_binomial(honest, few) + honest + few * opens < -70


@pytest.mark.parametrize("sites", SIZES)
def test_told_the_same_lists_large_parts_of_the_survivors_hang_together(sites: int) -> None:
    """Two sets of at least a sixth each without one pick between them, of whoever survived."""
    made, corrupt = Graph.of(sites, sites), sites // 3
    honest, part = sites - corrupt, -(-sites // 6)
    none = log_tail(sites - 1, part, made.degree, [0])
    assert honest * math.log2(3) + 2 * part * none < -70


@pytest.mark.parametrize("sites", SIZES)
def test_a_tenth_may_drop_out(sites: int) -> None:
    made, lost = Graph.of(sites, sites), sites // 10
    too_many = range(made.degree - made.threshold + 1, lost + 1)
    assert math.log2(sites) + log_tail(sites - 1, lost, made.degree, too_many) <= -20 + 1e-6


@pytest.mark.parametrize(
    ("dropped", "degree", "threshold"), [(10, 102, 72), (3, 290, 152)], ids=["tenth", "third"]
)
def test_if_all_were_told_the_same_half_as_many_holders_would_do(
    dropped: int, degree: int, threshold: int
) -> None:
    """Known figures for 1000 sites where a third is corrupt and lists are never split.

    Then ``t`` has only to be more than the corrupt holders. They come from bounds that are a
    little wider than the exact tails.
    """
    sites, corrupt = 1000, 333

    def enough(k: int) -> bool:
        t = rare(sites - 1, corrupt, k, (sites - corrupt) << 40)
        return k - t + 1 >= rare(sites - 1, sites // dropped, k, sites << 20)

    found = next(k for k in itertools.count(1) if enough(k))
    t = rare(sites - 1, corrupt, found, (sites - corrupt) << 40)
    assert found == pytest.approx(degree, rel=0.02)
    assert t == pytest.approx(threshold, rel=0.02)
    assert Graph.of(sites, 667).degree > 2 * 102


def test_if_no_degree_is_enough_the_graph_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_DROPPED", 2)  # half of them
    graph._smallest.cache_clear()
    assert Graph.of(300, 201) == Graph(300, 299, 201)
    graph._smallest.cache_clear()


def test_all_sets_of_holders_are_picked_equally_often() -> None:
    """Every pair of random numbers, for two holders of five sites."""
    found: Counter[tuple[int, ...]] = Counter()
    for first, second in itertools.product(range(4), range(3)):
        drawn = iter([first, second])
        found[Graph(5, 2, 2).holders(3, lambda n: next(drawn).to_bytes(n, "big"))] += 1  # noqa: B023
    assert set(found) == {
        tuple(sorted((3, *pair))) for pair in itertools.combinations((1, 2, 4, 5), 2)
    }
    assert set(found.values()) == {2}


def test_a_number_that_would_make_the_choice_uneven_is_drawn_again() -> None:
    drawn = iter([2**64 - 1, 2**64 - 2, 5])  # 2**64 is one more than a multiple of 3
    picked = Graph(4, 1, 1).holders(4, lambda n: next(drawn).to_bytes(n, "big"))
    assert picked == (3, 4)  # by 2**64 - 2, the last number that counts
    assert next(drawn) == 5


def test_holders_come_from_the_operating_system_and_in_the_complete_graph_from_nowhere() -> None:
    picked = {Graph.of(1000, 667).holders(500) for _ in range(5)}
    assert len(picked) == 5
    assert all(len(set(one)) == 224 and 500 in one for one in picked)

    def never(_: int) -> bytes:
        raise AssertionError

    assert Graph.of(7, 5).holders(2, never) == tuple(range(1, 8))


def test_what_is_no_graph_or_no_site_or_no_source_is_refused() -> None:
    for degree, threshold in ((-1, 1), (5, 1), (3, 0), (3, 5)):
        with pytest.raises(ValueError, match="no threshold of"):
            Graph(5, degree, threshold)
    for own in (0, 6, -1):
        with pytest.raises(ValueError, match=f"site {own} of 5"):
            Graph(5, 2, 2).holders(own)
    with pytest.raises(ValueError, match="gave 3 random bytes, not 8"):
        Graph(5, 2, 2).holders(1, lambda _: b"abc")


def test_the_graph_is_bound_where_it_is_not_complete() -> None:
    """Up to two hundred sites a cohort is signed as it was before there was a choice."""
    federation = Federation(list("abcdef"))
    adverts = tuple(federation.member(name).advertise(ROUND) for name in "abcdef")
    hashed = [hashlib.sha256(advert.body(ROUND)).hexdigest() for advert in adverts]
    bound = ROUND.bind("cohort", adverts=hashed, threshold=4, subject="")
    before = hashlib.sha256(bound).hexdigest()
    assert Cohort(ROUND, adverts, 4).digest == before
    digests = {
        Cohort(ROUND, adverts, 4, lambda n, _, k=k, t=t: Graph(n, k, t)).digest  # type: ignore[misc]
        for k, t in ((3, 3), (4, 3), (4, 4))
    }
    assert len(digests | {before}) == 4

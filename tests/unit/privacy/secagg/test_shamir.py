"""Secret sharing: any t shares, no fewer, and a false one never goes unseen."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.privacy.secagg.context import Context, commit, opens
from lepton_fed.privacy.secagg.shamir import PRIME, Weights, combine, split, split_at
from tests.unit.privacy.secagg import naive
from tests.unit.privacy.secagg.published import random_bytes

SECRETS = st.one_of(st.binary(min_size=32, max_size=32), st.just(bytes(32)), st.just(b"\xff" * 32))
CONTEXT = Context("run", 1, 1, "aa", "bb", "cc")


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, int, list[int]]:
    shares = draw(st.integers(1, 12))
    threshold = draw(st.integers(1, shares))
    points = st.permutations(range(1, shares + 1))
    answered = draw(st.integers(threshold, shares))
    return draw(SECRETS), shares, threshold, list(draw(points))[:answered]


@given(sharings())
@settings(max_examples=150, deadline=None)
def test_any_threshold_of_shares_gives_the_secret(
    case: tuple[bytes, int, int, list[int]],
) -> None:
    secret, shares, threshold, points = case
    source, same = random_bytes("coefficients"), random_bytes("coefficients")
    made = split(secret, shares, threshold, source)
    assert made == naive.split(secret, shares, threshold, same)
    assert {len(share) for share in made} == {33}
    answered = {point: made[point - 1] for point in points}
    assert combine(answered, threshold) == secret
    few = dict(list(answered.items())[:threshold])
    assert naive.interpolate(few) == int.from_bytes(secret, "big")


@given(sharings(), SECRETS)
@settings(max_examples=80, deadline=None)
def test_fewer_shares_fit_any_other_secret_as_well(
    case: tuple[bytes, int, int, list[int]], other: bytes
) -> None:
    """Whatever secret is claimed for t - 1 shares, there is one missing share that fits it."""
    secret, shares, threshold, _ = case
    made = split(secret, shares, threshold, random_bytes("coefficients"))
    few = dict(itertools.islice(enumerate(made, 1), threshold - 1))
    # The polynomial of degree t - 1 through the few and (0, other), read at the next point.
    points = {
        0: int.from_bytes(other, "big"),
        **{x: int.from_bytes(s, "big") for x, s in few.items()},
    }
    missing = 0
    for x, y in points.items():
        weight = y
        for z in points:
            if z != x:
                weight = weight * (threshold - z) * pow(x - z, -1, PRIME) % PRIME
        missing = (missing + weight) % PRIME
    assert combine({**few, threshold: missing.to_bytes(33, "big")}, threshold) == other
    with pytest.raises(ValueError, match=f"{threshold - 1} shares where {threshold} are needed"):
        combine(few, threshold)


@given(sharings(), st.integers(0, 32), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_false_share_gives_another_secret_which_the_commitment_tells(
    case: tuple[bytes, int, int, list[int]], place: int, change: int
) -> None:
    secret, shares, threshold, points = case
    committed = commit(CONTEXT, "self mask", secret, owner="a")
    made = split(secret, shares, threshold, random_bytes("coefficients"))
    answered = {point: made[point - 1] for point in sorted(points)[:threshold]}
    assert opens(committed, CONTEXT, "self mask", combine(answered, threshold), owner="a")
    liar = points[0] if points[0] in answered else next(iter(answered))
    false = bytearray(answered[liar])
    false[place] ^= change
    try:
        found = combine({**answered, liar: bytes(false)}, threshold)
    except ValueError:
        return  # no element of the field, or no secret of 32 bytes
    assert found != secret
    assert not opens(committed, CONTEXT, "self mask", found, owner="a")


def test_shares_for_some_points_are_those_that_all_would_get() -> None:
    secret, points = bytes(range(32)), [40, 3, 17, 250]
    made = split_at(secret, points, 3, random_bytes("points"))
    everyone = split(secret, 250, 3, random_bytes("points"))
    assert made == {point: everyone[point - 1] for point in points}
    assert combine({point: made[point] for point in (250, 3, 40)}, 3) == secret
    for wrong, said in (([0, 1, 2], "point 0"), ([1, 1, 2], "twice"), ([1, 65_536, 2], "65536")):
        with pytest.raises(ValueError, match=said):
            split_at(secret, wrong, 3)
    with pytest.raises(ValueError, match="out of range"):
        split_at(secret, [5, 6], 3)


def test_weights_serve_for_many_secrets_and_leave_further_shares_aside() -> None:
    source = random_bytes("many")
    made = {n: split(bytes([n]) * 32, 9, 4, source) for n in range(5)}
    weights = Weights.at([9, 2, 7, 3, 5], 4)
    assert weights.points == (2, 3, 5, 7)
    for n, shares in made.items():
        answered = {x: shares[x - 1] for x in (2, 3, 5, 7)} | {9: b"not even a share"}
        assert weights.combine(answered) == bytes([n]) * 32


def test_the_weights_are_lagranges() -> None:
    weights = Weights.at([1, 4, 6, 65_535], 4)
    for x, value in zip(weights.points, weights.values, strict=True):
        others = [other for other in weights.points if other != x]
        assert (
            value * math.prod(x - o for o in others) % PRIME
            == math.prod(-o for o in others) % PRIME
        )
    assert sum(weights.values) % PRIME == 1  # a constant polynomial gives itself


def test_two_hundred_sites_with_two_thirds() -> None:
    source = random_bytes("large")
    secret = source(32)
    made = split(secret, 200, 134, source)
    assert combine({x: made[x - 1] for x in range(67, 201)}, 134) == secret


def test_shares_of_the_operating_system_differ_each_time() -> None:
    assert len({tuple(split(bytes(32), 3, 2)) for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("drawn", "coefficient"),
    [
        # 2**257 - 1, once the upper 7 bits are cut, and the prime itself are drawn again.
        ([b"\xff" * 33, PRIME.to_bytes(33, "big"), (PRIME - 1).to_bytes(33, "big")], PRIME - 1),
        ([b"\xfe" + bytes(31) + b"\x05"], 5),
        ([bytes(33)], 0),  # also where it is the highest coefficient
    ],
)
def test_coefficients_are_exactly_uniform(drawn: list[bytes], coefficient: int) -> None:
    source = iter(drawn)
    shares = split(bytes(32), 2, 2, lambda _: next(source))
    assert int.from_bytes(shares[0], "big") == coefficient
    assert next(source, None) is None


def test_the_prime_is_the_smallest_above_two_to_the_256() -> None:
    """Miller and Rabin's test to 40 bases; every number between fails Fermat's to base 3."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in first_primes(40):
        powers = [pow(base, odd << i, PRIME) for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers
    for candidate in range(2**256, PRIME):
        assert pow(3, candidate - 1, candidate) != 1


def first_primes(count: int) -> list[int]:
    found: list[int] = []
    for candidate in itertools.count(2):
        if all(candidate % prime for prime in found):
            found.append(candidate)
            if len(found) == count:
                return found
    raise AssertionError


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes, not 32"):
        split(bytes(length), 3, 2)


@pytest.mark.parametrize(("shares", "threshold"), [(3, 0), (3, 4), (0, 0), (3, -1), (65_536, 2)])
def test_a_threshold_or_number_out_of_range_is_refused(shares: int, threshold: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        split(bytes(32), shares, threshold)


@pytest.mark.parametrize(
    ("points", "threshold", "said"),
    [
        ([0, 1], 2, "point 0"),
        ([-1, 1], 2, "point -1"),
        ([65_536, 1], 2, "point 65536"),
        ([1, 1, 2], 2, "twice"),
        ([7, 7, 7], 3, "twice"),
        ([1], 2, "1 shares where 2"),
        ([], 1, "0 shares where 1"),
        ([1, 2], 0, "threshold 0"),
    ],
)
def test_points_that_are_no_set_of_enough_sites_are_refused(
    points: list[int], threshold: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Weights.at(points, threshold)


def test_shares_that_are_none_are_refused() -> None:
    made = dict(enumerate(split(bytes(32), 3, 2), 1))
    for share, said in (
        (b"", "point 1 has 0 bytes"),
        (bytes(32), "point 1 has 32 bytes"),
        (bytes(34), "point 1 has 34 bytes"),
        (PRIME.to_bytes(33, "big"), "point 1 is no element"),
        (b"\xff" * 33, "point 1 is no element"),
    ):
        with pytest.raises(ValueError, match=said):
            combine({**made, 1: share}, 2)
    with pytest.raises(ValueError, match="point 2 is missing"):
        Weights.at([1, 2], 2).combine({1: made[1]})


def test_a_result_above_32_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="do not stand for a secret of 32 bytes"):
        combine({1: (2**256).to_bytes(33, "big")}, 1)


def test_a_source_that_gives_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="gave 3 random bytes, not 33"):
        split(bytes(32), 3, 2, lambda _: b"abc")

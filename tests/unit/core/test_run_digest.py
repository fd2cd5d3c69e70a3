from __future__ import annotations

import itertools

import pytest

from lepton_fed.core.run_digest import RunDigest

ROUNDS = [(1, ("a", "b", "c"), "m1"), (2, ("b",), "m2"), (3, (), "m2")]


def digest(rounds: list[tuple[int, tuple[str, ...], str]], task: str = "t", seed: int = 1) -> str:
    run = RunDigest(task, seed)
    for number, contributors, model in rounds:
        run.add_round(number, contributors, model)
    return run.value


def test_the_order_in_which_contributors_are_given_does_not_matter() -> None:
    orders = itertools.permutations(ROUNDS[0][1])
    assert {digest([(1, order, "m1"), *ROUNDS[1:]]) for order in orders} == {digest(ROUNDS)}


@pytest.mark.parametrize(
    "other",
    [
        digest(ROUNDS, task="t2"),
        digest(ROUNDS, seed=2),
        digest(ROUNDS[:2]),
        digest(ROUNDS[1:]),
        digest([ROUNDS[1], ROUNDS[0], ROUNDS[2]]),
        digest([(1, ("a", "b"), "m1"), *ROUNDS[1:]]),
        digest([(1, ("a", "b", "c", "c"), "m1"), *ROUNDS[1:]]),
        digest([(1, ("a", "b,c"), "m1"), *ROUNDS[1:]]),
        digest([(1, ROUNDS[0][1], "m1x"), *ROUNDS[1:]]),
        digest([(4, ROUNDS[0][1], "m1"), *ROUNDS[1:]]),
        digest([]),
    ],
)
def test_everything_else_matters(other: str) -> None:
    assert other != digest(ROUNDS)


def test_a_digest_goes_on_from_its_state() -> None:
    first = RunDigest("t", 1)
    first.add_round(*ROUNDS[0])
    second = RunDigest("t", 1, state=first.value)
    for later in ROUNDS[1:]:
        second.add_round(*later)
    assert second.value == digest(ROUNDS)


def test_a_digest_is_64_hexadecimal_digits() -> None:
    assert len(bytes.fromhex(digest(ROUNDS))) == 32

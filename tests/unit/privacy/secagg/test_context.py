"""Contexts: nothing that is derived in one case is worth anything in another."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lepton_fed.privacy.secagg.context import Context, commit, derive, opens

CONTEXT = Context("run", 3, 1, "aa", "bb", "cc")
OTHER_VALUES = ("run2", 4, 2, "ab", "bc", "cd")
OTHERS = [
    dataclasses.replace(CONTEXT, **{field.name: value})
    for field, value in zip(
        dataclasses.fields(Context), ("run2", 4, 2, "ab", "bc", "cd"), strict=True
    )
]
SECRET = bytes(range(32))


def test_every_part_of_a_context_counts() -> None:
    bound = [c.bind("mask", sites=[1, 2]) for c in (CONTEXT, *OTHERS)]
    bound += [CONTEXT.bind("envelope", sites=[1, 2]), CONTEXT.bind("mask", sites=[2, 1])]
    bound += [CONTEXT.bind("mask"), Context("run", 3, 1, "aab", "b", "cc").bind("mask")]
    assert len(set(bound)) == len(bound)
    assert all(b"lepton-fed secure aggregation 1" in one for one in bound)


def test_texts_cannot_be_shifted_against_each_other() -> None:
    sly = Context('run","task":"bb', 3, 1, "aa", "x", "cc")
    assert sly.bind("mask") != Context("run", 3, 1, "aa", "bb", "cc").bind("mask")


def test_keys_are_those_of_rfc_5869_test_case_3() -> None:
    """SHA-256, no salt, no info: the one published case that has none."""
    expected = (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
    assert derive(b"\x0b" * 22, b"", 42).hex() == expected
    assert derive(bytearray(b"\x0b" * 22), b"", 42).hex() == expected


def test_a_commitment_opens_for_its_own_case_only() -> None:
    kinds, sites = ("self mask", "mask"), ("a", "b")
    cases = list(itertools.product([CONTEXT, *OTHERS], kinds, sites, ("", "a", "b")))
    made = {
        commit(context, kind, SECRET, owner=owner, holder=holder)
        for context, kind, owner, holder in cases
    }
    assert len(made) == len(cases)
    committed = commit(CONTEXT, "mask", SECRET, owner="a")
    assert opens(committed, CONTEXT, "mask", bytearray(SECRET), owner="a")
    assert not opens(committed, CONTEXT, "mask", SECRET, owner="a", holder="a")
    assert not opens(committed, OTHERS[1], "mask", SECRET, owner="a")
    for secret in (SECRET + b"\0", bytes(32), b"\0" + SECRET):
        assert not opens(committed, CONTEXT, "mask", secret, owner="a")
    for other in (b"", committed[:-1], committed + b"\0"):
        assert not opens(other, CONTEXT, "mask", SECRET, owner="a")


@pytest.mark.parametrize("length", [0, 16, 31])
def test_a_secret_that_could_be_guessed_is_not_committed_to(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes cannot be committed"):
        commit(CONTEXT, "mask", bytes(length), owner="a")

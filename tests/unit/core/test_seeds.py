from __future__ import annotations

import hashlib
import itertools

import numpy as np
import torch

from lepton_fed.core.seeds import derive_seed, generator

RUNS, ROUNDS = range(3), range(4)
SITES, PURPOSES = ("", "a", "b", "site-1"), ("init", "select", "shuffle")


def every_choice() -> dict[tuple[int, int, str, str], int]:
    names = itertools.product(RUNS, ROUNDS, SITES, PURPOSES)
    return {
        (run, number, site, purpose): derive_seed(run, purpose, round_number=number, site=site)
        for run, number, site, purpose in names
    }


def test_choices_that_differ_in_one_respect_have_different_seeds() -> None:
    seeds = every_choice()
    assert len(set(seeds.values())) == len(seeds)


def test_a_seed_depends_on_its_name_alone_and_not_on_what_was_drawn_before() -> None:
    before = every_choice()
    assert dict(reversed(list(before.items()))) == before
    for (run, number, site, purpose), seed in reversed(list(before.items())):
        assert derive_seed(run, purpose, round_number=number, site=site) == seed


def test_seeds_fill_the_range_that_numpy_and_torch_accept() -> None:
    seeds = list(every_choice().values())
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert min(seeds) < 2**58
    assert torch.Generator().manual_seed(max(seeds)).initial_seed() == max(seeds)


def test_names_cannot_run_into_each_other() -> None:
    assert derive_seed(1, "ab", site="c") != derive_seed(1, "a", site="bc")
    assert derive_seed(11, "x", round_number=1) != derive_seed(1, "x", round_number=11)


def test_a_seed_is_the_first_63_bits_of_the_hash_of_its_name() -> None:
    name = b'lepton-fed seed 1\0{"purpose":"init","round":2,"run":1,"site":"a"}'
    first = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
    assert derive_seed(1, "init", round_number=2, site="a") == first >> 1


def test_a_generator_repeats_and_leaves_the_global_one_alone() -> None:
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - it is the global one that is watched
    first = generator(5, "select", round_number=2).random(8)
    assert np.array_equal(first, generator(5, "select", round_number=2).random(8))
    assert not np.array_equal(first, generator(5, "select", round_number=3).random(8))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002

from __future__ import annotations

from collections import Counter

import pytest

from lepton_fed.server.select import select_cohort

SITES = [f"site-{i}" for i in range(20)]


@pytest.mark.parametrize("size", [1, 6, 10, 20])
def test_a_cohort_has_the_wanted_size(size: int) -> None:
    cohort = select_cohort(SITES, size, seed=1, round_number=1)
    assert len(cohort) == len(set(cohort)) == size
    assert set(cohort) <= set(SITES)


@pytest.mark.parametrize("size", [6, 20])
def test_a_cohort_is_sorted_and_does_not_depend_on_the_order_of_the_sites(size: int) -> None:
    cohort = select_cohort(SITES, size, seed=4, round_number=2)
    assert list(cohort) == sorted(cohort)
    assert select_cohort(SITES[::-1], size, seed=4, round_number=2) == cohort
    assert select_cohort(tuple(SITES[7:] + SITES[:7]), size, seed=4, round_number=2) == cohort


def test_seed_and_round_decide() -> None:
    cohorts = {
        (seed, number): select_cohort(SITES, 6, seed, number)
        for seed in range(4)
        for number in range(1, 5)
    }
    assert len(set(cohorts.values())) == len(cohorts)
    for (seed, number), cohort in cohorts.items():
        assert select_cohort(SITES, 6, seed, number) == cohort


def test_over_many_rounds_every_site_has_its_share() -> None:
    rounds = 2000
    picked = Counter(
        site for number in range(rounds) for site in select_cohort(SITES, 5, 9, number)
    )
    # Binomial, mean 500 and deviation 19.4: five deviations.
    assert all(403 <= picked[site] <= 597 for site in SITES)

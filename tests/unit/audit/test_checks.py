"""Each way in which a training can be other than it claims, as the checks see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.audit.checks import (
    check_accounting,
    check_bound,
    check_contribution,
    check_noise,
)
from lepton_fed.audit.claims import Claims, SiteClaim
from lepton_fed.audit.contribution import Contribution
from lepton_fed.audit.lower_bound import LowerBound
from lepton_fed.audit.mechanism import Mechanism, composed
from lepton_fed.audit.training import Watched
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, ServerConf, StrategyConf
from lepton_fed.core.task import Task
from lepton_fed.privacy.dp.accounting import OrderedGaussian, SampledGaussian, epsilon_of

MECHANISM = Mechanism(2.0, 0.25, steps=10, rounds=5, sampler="poisson")
DELTA = 1e-5
EVENT = SampledGaussian(2.0, 0.25, 10)


def watched(seed: int = 0, canaries: int = 1000) -> Watched:
    draws = np.random.default_rng(seed)
    included = draws.random(canaries) < 0.5
    taken = (draws.random((50, canaries)) < MECHANISM.rate) & included
    noise = draws.normal(0.0, 2.0, (50, canaries))
    claimed = composed(MECHANISM, DELTA)
    return Watched(included, taken + noise, taken * 1.0, MECHANISM, 2.0, claimed, DELTA)


def claims(*sites: SiteClaim) -> Claims:
    spent = epsilon_of([EVENT] * 5, DELTA)
    record = RecordPrivacy(True, spent * 1.0001, DELTA, 1.0)
    agreement = Agreement("run", Task(), StrategyConf(), 5, 1, Privacy(record))
    return Claims(agreement, sites, Path("audit.json"), ServerConf())


def honest(**other: object) -> SiteClaim:
    site = SiteClaim("east", epsilon_of([EVENT] * 5, DELTA), 5, (EVENT,) * 5)
    return replace(site, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_sound_training_passes(seed: int) -> None:
    seen = watched(seed)
    assert check_noise(seen).passed
    assert check_accounting(seen, claims(honest())).passed


def of_shares(*sizes: float) -> Watched:
    """A sum of sites' shares; each size is over what it should be."""
    share = 2.0 / len(sizes) ** 0.5
    return replace(watched(), shares=np.array([[share * size] * 50 for size in sizes]))


def test_shares_of_the_right_size_pass_and_one_of_another_is_named() -> None:
    sound = check_noise(of_shares(1.0, 1.01, 0.99))
    assert sound.passed
    assert "in the sum of 3 shares" in sound.found
    assert sound.numbers["least_share"] == pytest.approx(0.99)
    found = check_noise(of_shares(1.0, 0.9, 1.0))
    assert not found.passed
    assert "site 2 adds 0.90 of its share" in found.found


def test_a_rounded_sum_that_moves_by_more_than_is_accounted_for_is_found() -> None:
    sound = Contribution(1.0, 9, "", "", rounded=0.99)
    assert check_contribution(sound, watched()).passed
    found = check_contribution(replace(sound, rounded=1.01), watched())
    assert not found.passed
    assert "1.01 of what is accounted for" in found.found


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1])
def test_other_noise_than_configured_is_found(factor: float) -> None:
    seen = watched()
    found = check_noise(replace(seen, noised=seen.noised * factor))
    assert not found.passed
    assert "off" in found.found


def test_one_step_with_half_the_noise_is_found() -> None:
    seen = watched()
    seen.noised[17] /= 2
    found = check_noise(seen)
    assert not found.passed
    assert "one step has 0.5" in found.found


def test_noise_that_comes_twice_is_found() -> None:
    seen = watched()
    again = seen.noised.copy()
    again[25:] = again[:25]
    found = check_noise(replace(seen, noised=again))
    assert not found.passed
    assert "not independent" in found.found


def test_noise_that_takes_itself_back_is_found() -> None:
    seen = watched()
    again = seen.noised.copy()
    again[25:] = -again[:25]
    assert not check_noise(replace(seen, noised=again)).passed


@pytest.mark.parametrize("norm", [1 + 2e-5, 4.0, np.inf])
def test_a_contribution_above_the_clip_is_found(norm: float) -> None:
    found = check_contribution(Contribution(norm, 9, "all one", "as trained"), watched())
    assert not found.passed
    assert "all one" in found.found
    assert check_contribution(Contribution(1 + 5e-6, 9, "", ""), watched()).passed


def test_a_canary_above_the_clip_is_found() -> None:
    seen = watched()
    seen.silent[3, 4] = 1.1
    assert not check_contribution(Contribution(1.0, 9, "", ""), seen).passed


def test_a_bound_above_the_claim_is_found() -> None:
    seen = watched()
    above = LowerBound(seen.claimed + 0.01, 0.95, 1000, 100, 100)
    assert not check_bound(above, seen).passed
    assert check_bound(replace(above, epsilon=seen.claimed - 0.01), seen).passed


@pytest.mark.parametrize("part", [0.2, 0.99])
def test_a_training_that_claims_less_than_it_did_is_found(part: float) -> None:
    seen = watched()
    found = check_accounting(replace(seen, claimed=part * seen.claimed), claims(honest()))
    assert not found.passed
    assert "the audited training claims" in found.found


def test_steps_that_were_not_charged_are_found() -> None:
    seen = watched()
    more = np.concatenate([seen.noised, seen.noised[:1]])
    assert not check_accounting(replace(seen, noised=more), claims(honest())).passed


def test_a_higher_sampling_rate_than_accounted_is_found() -> None:
    seen = watched()
    draws = np.random.default_rng(1)
    taken = (draws.random(seen.silent.shape) < 0.3) & seen.included
    found = check_accounting(replace(seen, silent=taken * 1.0), claims(honest()))
    assert "with probability 0.3" in found.found


def test_shuffled_batches_that_pass_for_poisson_samples_are_found() -> None:
    seen = watched()
    draws = np.random.default_rng(2)
    taken = np.zeros(seen.silent.shape)
    for step in range(0, 48, 4):
        part = draws.permutation(np.arange(1000) % 4)
        for offset in range(4):
            taken[step + offset] = part == offset
    shuffled = replace(seen, silent=taken[:48] * seen.included)
    found = check_accounting(shuffled, claims(honest()))
    assert not found.passed
    assert "Poisson" in found.found


def in_order(steps: int = 10) -> Watched:
    """Passes of four batches, each record in one of them."""
    seen = watched()
    mechanism = replace(MECHANISM, sampler="shuffled", steps=steps)
    draws = np.random.default_rng(3)
    taken = np.zeros(seen.silent.shape)
    for begun in range(0, len(taken), 4):
        places = draws.permutation(np.arange(1000) % 4)
        for place, step in enumerate(range(begun, min(begun + 4, len(taken)))):
            taken[step] = (places == place) & seen.included
    return replace(
        seen, silent=taken, mechanism=mechanism, claimed=composed(mechanism, DELTA)
    )  # fmt: skip


def test_an_order_costs_its_passes_and_sound_batches_of_it_pass() -> None:
    seen = in_order()
    assert seen.mechanism.passes == 3
    event = OrderedGaussian(2.0, 0.25, 10, 3, "shuffled")
    assert seen.claimed == pytest.approx(epsilon_of([event] * 5, DELTA), rel=1e-3)
    record = replace(claims().record, sampler="shuffled", epsilon=1.001 * seen.claimed)
    site = honest(epsilon=seen.claimed, charged=(event,) * 5)
    agreement = replace(claims().agreement, privacy=Privacy(record))
    found = check_accounting(seen, replace(claims(site), agreement=agreement))
    assert found.passed, found.found


def test_a_record_that_is_twice_in_a_pass_is_found() -> None:
    seen = in_order()
    seen.silent[1] = np.maximum(seen.silent[1], seen.silent[0])
    assert "in 2 steps of one pass" in check_accounting(seen, claims(honest())).found


def test_poisson_samples_that_pass_for_an_order_are_found() -> None:
    seen = replace(in_order(), silent=watched().silent)
    assert "steps of one pass" in check_accounting(seen, claims(honest())).found


def test_a_record_that_a_pass_leaves_out_is_found() -> None:
    seen = in_order()
    seen.silent[2, int(np.flatnonzero(seen.silent[2])[0])] = 0.0
    assert "in no step of a pass" in check_accounting(seen, claims(honest())).found


def test_a_ledger_that_charges_another_sampler_is_found() -> None:
    event = OrderedGaussian(2.0, 0.25, 10, 3, "full")
    found = check_accounting(watched(), claims(honest(charged=(event,) * 5)))
    assert "charged for the full sampler, poisson was agreed to" in found.found


def test_many_steps_of_small_losses_are_composed_as_finely_as_they_are_charged() -> None:
    # On the coarsest grid these would cost half as much again.
    mechanism = Mechanism(10.0, 0.001, steps=1000, rounds=30, sampler="poisson")
    charged = epsilon_of([SampledGaussian(10.0, 0.001, 30_000)], DELTA)
    assert composed(mechanism, DELTA) == pytest.approx(charged, rel=1e-3)


@pytest.mark.parametrize(
    ("site", "why"),
    [
        (honest(epsilon=0.5), "east claims 0.5, its ledger gives"),
        (honest(charged=(EVENT,) * 4), "took part in 5 rounds and charged 4"),
        (honest(charged=(EVENT,) * 9), "'s ledger gives"),
        (honest(epsilon=50.0), "east spent 50"),
        (honest(epsilon=50.0, charged=None), "east spent 50"),
    ],
)
def test_a_record_that_contradicts_itself_is_found(site: SiteClaim, why: str) -> None:
    found = check_accounting(watched(), claims(honest(), site))
    assert not found.passed
    assert why in found.found


def test_without_ledgers_it_says_where_they_are() -> None:
    found = check_accounting(watched(), claims(honest(charged=None)))
    assert found.passed
    assert "the ledgers are at the sites" in found.found
    assert "ledgers" not in found.numbers

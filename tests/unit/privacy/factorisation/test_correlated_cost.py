"""What steps of DP-FTRL are charged: parts that add up to one Gaussian, to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import dp_event, pld

from lepton_fed.privacy.dp.accounting import (
    CorrelatedGaussian,
    OrderedGaussian,
    SampledGaussian,
    adjacency_of,
    epsilon_of,
    event_of,
    guarantee_of,
    terms,
)
from lepton_fed.privacy.dp.events import MOST_CORRELATED_STEPS, charged_steps
from lepton_fed.privacy.factorisation.toeplitz import sensitivity, square_root

DELTA = 1e-5
ROUND = CorrelatedGaussian(1.4, 0.1, 7, 0, 210, 10, 32)


def rounds_of(event, count):
    charged = []
    for _ in range(count):
        charged.append(event.after(charged))
    return charged


@pytest.mark.parametrize("band", [1, 2, 32, 210])
@pytest.mark.parametrize("separation", [1, 10, 300])
@pytest.mark.parametrize("noise", [0.6, 1.4, 7.77])
def test_all_rounds_together_cost_one_gaussian_to_the_last_bit(band, separation, noise):
    event = replace(ROUND, band=band, separation=separation, noise_multiplier=noise)
    charged = rounds_of(event, 30)
    assert charged_steps(charged, event) == 210
    other = replace(event, band=7, planned=420)
    assert charged_steps(charged, other) == other.after(charged).first == 0
    whole = event.times(30)
    assert epsilon_of(charged, DELTA) == epsilon_of([whole], DELTA)
    shuffled = [charged[i] for i in np.random.default_rng(1).permutation(30)]
    assert epsilon_of(shuffled, DELTA) == epsilon_of([whole], DELTA)
    one = epsilon_of([SampledGaussian(noise, 1.0, 1)], DELTA)
    assert one - 1e-9 <= epsilon_of([whole], DELTA) <= one * (1 + 1e-6)


@pytest.mark.parametrize("done", [1, 5, 29])
def test_rounds_cost_what_the_mechanism_of_so_many_steps_costs(done):
    """The oracle: the sensitivity of the first rows alone, and dp-accounting's Gaussian of it."""
    coefficients, steps = square_root(32), 7 * done
    whole = sensitivity(coefficients, 210, 21, 10)
    part = sensitivity(coefficients, steps, -(-steps // 10), 10)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_event.GaussianDpEvent(1.4 * whole / part))
    found, fine = epsilon_of(rounds_of(ROUND, done), DELTA), accountant.get_epsilon(DELTA)
    assert fine - 1e-6 <= found <= 1.005 * fine + 1e-3


def test_what_is_reserved_and_what_is_charged_is_the_whole_after_each_round():
    whole = epsilon_of([ROUND.times(30)], DELTA)
    charged = []
    for done in range(31):
        rest = ROUND.after(charged).times(30 - done)
        assert epsilon_of([*charged, rest], DELTA) == whole
        charged.append(ROUND.after(charged))
    assert charged[-1].steps == 0, "all that was planned is charged"


def test_a_round_that_costs_nothing_more_costs_nothing():
    again = replace(ROUND, first=7, steps=0)
    assert epsilon_of([again], DELTA) == 0.0
    assert again.parts()[2] == 0
    assert epsilon_of([ROUND, again, again], DELTA) == epsilon_of([ROUND], DELTA)
    # Independent noise, one pass: a record is in one step, and the first one has paid for it.
    fresh = CorrelatedGaussian(2.0, 0.01, 10, 0, 100, 100, 1)
    assert [event.inverse_square for event in rounds_of(fresh, 10)] == [0.25] + [0.0] * 9


def test_gaussians_that_nothing_amplifies_are_one_and_never_less():
    events = [SampledGaussian(8.0 + n, 1.0, 3) for n in range(20)]
    events += [OrderedGaussian(9.0 + n, 0.2, 10, 2, "full") for n in range(20)]
    squares = sum(3 / (8.0 + n) ** 2 + 2 / (9.0 + n) ** 2 for n in range(20))
    one = epsilon_of([SampledGaussian(1 / math.sqrt(squares), 1.0, 1)], DELTA)
    assert one - 1e-9 <= epsilon_of(events, DELTA) <= one * (1 + 1e-6)
    sampled = SampledGaussian(2.0, 0.1, 30)
    mixed = guarantee_of([*events, sampled, ROUND], DELTA)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    for event in events:
        noise, _, times = event.parts()
        accountant.compose(dp_event.GaussianDpEvent(noise), times)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(2.0)), 30)
    accountant.compose(dp_event.GaussianDpEvent(ROUND.parts()[0]))
    fine = accountant.get_epsilon(DELTA)
    assert fine * (1 - 1e-3) <= mixed.epsilon <= 1.01 * fine
    assert mixed.adjacency == "zero-out-one"
    assert mixed.samplers == ("full", "poisson")


def test_without_noise_it_costs_infinitely_much():
    silent = replace(ROUND, noise_multiplier=0.0)
    assert epsilon_of([silent], DELTA) == math.inf
    assert epsilon_of([replace(silent, steps=0)], DELTA) == 0.0
    assert epsilon_of([OrderedGaussian(0.0, 0.1, 3, 1, "full"), ROUND], DELTA) == math.inf


def test_an_event_reads_back_and_another_is_refused():
    record = ROUND.record()
    assert event_of(record) == ROUND
    assert (record["mechanism"], record["sampler"]) == ("dp_ftrl", "full")
    assert record["adjacency"] == adjacency_of("full") == "zero-out-one"
    for changes in (
        {"mechanism": "dp_sgd"}, {"band": 0}, {"band": 211}, {"first": 204}, {"first": -1},
        {"separation": 0}, {"planned": 7.0}, {"steps": True}, {"passes": 1}, {"sampler": "poisson"},
        {"planned": MOST_CORRELATED_STEPS + 1}, {"band": "32"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"not the record|no such"):
            event_of({**record, **changes})
    for key in ("band", "first", "planned", "separation", "mechanism"):
        with pytest.raises(ValueError, match="not the record"):
            event_of({name: value for name, value in record.items() if name != key})


def test_terms_name_the_mechanism():
    assert "zero-out-one, full sampler with correlated noise (dp_ftrl)" in terms(
        "full", DELTA, "dp_ftrl"
    )
    assert "correlated" not in terms("full", DELTA)

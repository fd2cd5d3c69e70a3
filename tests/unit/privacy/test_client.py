"""Client-level DP of a run: what is agreed on costs what is said, and what lies is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    ClientPrivacy,
    Privacy,
    RecordPrivacy,
    SecureAggregation,
    StrategyConf,
)
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.errors import Refused, TaskError
from lepton_fed.privacy.client import client_noise, honest_sites, with_client_noise
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.server.noised import central_sum
from lepton_fed.strategies.base import DELTA

SIZE, ROUNDS, SITES = 900, 20, 10
TASK = Task(aggregation=Aggregation(norm_bound=4.0))
SHARED = ClientPrivacy(enabled=True, epsilon=8.0, clip=0.5, honest=7)
SKELLAM = replace(SHARED, mechanism="skellam")
CENTRAL = ClientPrivacy(enabled=True, epsilon=8.0, clip=0.5, noise="coordinator")
ENDLESS = 10**5000


def offered(
    client: ClientPrivacy = SHARED, task: Task = TASK, record: RecordPrivacy | None = None,
    *, cohort: int = SITES, **secure: Any,
) -> Agreement:  # fmt: skip
    masked = SecureAggregation(**{"enabled": True, "bits": 24, **secure})
    privacy = Privacy(record or RecordPrivacy(), [], masked, client)
    return Agreement("run", task, StrategyConf(), ROUNDS, 1, privacy, cohort)


def agreed(*arguments: Any, **named: Any) -> Agreement:
    return with_client_noise(offered(*arguments, **named), SIZE)


def changed(agreement: Agreement, **numbers: Any) -> Agreement:
    """Return an agreement in which client-level DP says something else, at the same noise."""
    client = replace(agreement.privacy.client, **numbers)
    return replace(agreement, privacy=replace(agreement.privacy, client=client))


@pytest.mark.parametrize("client", [SHARED, SKELLAM, CENTRAL])
def test_the_agreed_noise_costs_the_target_and_no_more(client: ClientPrivacy):
    agreement = agreed(client)
    noise = client_noise(agreement, SIZE)
    assert noise is not None
    assert 0.995 * client.epsilon < noise.epsilon <= client.epsilon
    assert agreed(client) == agreement, "a run that goes on has the agreement that it began with"
    less = replace(agreement, client_noise=0.99 * agreement.client_noise)
    with pytest.raises(Refused) as refused:
        client_noise(less, SIZE)
    assert refused.value.code == "LF4630"


@pytest.mark.parametrize("client", [SHARED, CENTRAL])
def test_what_a_run_costs_is_what_privacy_loss_distributions_say(client: ClientPrivacy):
    noise = client_noise(agreed(client), SIZE)
    assert noise is not None
    oracle = epsilon_of([SampledGaussian(noise.noise_multiplier, 1.0, ROUNDS)], client.delta)
    assert noise.epsilon == pytest.approx(oracle, rel=0.01)


@pytest.mark.parametrize(("client", "bits"), [(SHARED, 20), (SHARED, 32), (SKELLAM, 24)])
def test_a_sum_of_ten_sites_is_that_of_their_clipped_updates_and_the_planned_noise(
    client: ClientPrivacy, bits: int
):
    agreement = agreed(client, bits=bits)
    noise = client_noise(agreement, SIZE)
    assert noise is not None
    draws, entropy = np.random.default_rng(0), Entropy(bytes(range(32)))
    layout = masked_layout(agreement, Shape("1" * 64, (DELTA,), SIZE, 0), train=True, evaluate=True)
    total, exact = np.zeros(layout.words, dtype=np.uint32), np.zeros(SIZE)
    for site in range(SITES):
        update = draws.normal(size=SIZE) * 0.01 * (site + 1)
        exact += update * min(1.0, client.clip / float(np.linalg.norm(update)))
        words, saturated = layout.encode({DELTA: noise.noisy_sum(3).encode(update, entropy)}, 1.0)
        assert saturated == 0
        total += words
    total &= np.uint32((1 << bits) - 1)
    opened = layout.open(total)
    assert opened.replies == SITES
    errors = noise.noisy_sum(3).decode(opened.vectors[DELTA].astype(np.uint64)) - exact
    wanted = noise.noise_multiplier * client.clip * math.sqrt(SITES / 7)
    assert errors.std() == pytest.approx(wanted, rel=4 / math.sqrt(2 * SIZE))
    assert errors.std() / SITES == pytest.approx(noise.mean_deviation(SITES), rel=0.1)
    assert abs(errors.mean()) < 4 * wanted / math.sqrt(SIZE)
    elsewhere = noise.noisy_sum(4).decode(opened.vectors[DELTA].astype(np.uint64)) - exact
    assert not np.allclose(elsewhere, errors, atol=wanted), "a round has its own rotation"


def test_a_vector_that_is_not_in_the_ring_is_not_masked():
    layout = masked_layout(agreed(), Shape("1" * 64, (DELTA,), SIZE, 0), train=True, evaluate=False)
    beyond = np.full(layout.size, 1 << 24, dtype=np.uint64)
    with pytest.raises(ValueError, match="not in a ring of 24"):
        layout.encode({DELTA: beyond}, 1.0)


def test_sites_that_must_stay_are_counted_on_when_nothing_is_said():
    silent = replace(SHARED, honest=0)
    assert honest_sites(offered(silent)) == 7
    assert honest_sites(offered(silent, threshold=0.9)) == 9
    assert honest_sites(offered(CENTRAL)) == 0
    assert honest_sites(offered(replace(SHARED, enabled=False))) == 0


WITHOUT = [
    (SHARED, {}, {"enabled": False}),
    (SHARED, {}, {"groups": 2}),
    (CENTRAL, {}, {"groups": 2}),
    (SHARED, {}, {"bits": 33}),
    (CENTRAL, {}, {"bits": 33}),
    (SKELLAM, {}, {"bits": 29}),
    (replace(SHARED, honest=11), {}, {}),
    (replace(SHARED, honest=-1), {}, {}),
    (replace(SHARED, clip=4.1), {}, {}),
    (replace(SHARED, clip=0.0), {}, {}),
    (replace(SHARED, clip=math.nan), {}, {}),
    (replace(SHARED, clip=ENDLESS), {}, {}),
    (replace(SHARED, mechanism="laplace"), {}, {}),
    (replace(CENTRAL, mechanism="skellam"), {}, {}),
    (replace(CENTRAL, honest=3), {}, {}),
    (SHARED, {"record": RecordPrivacy(enabled=True, noise="shared", sampling_rate=1)}, {}),
    (SHARED, {"task": Task(aggregation=Aggregation("rows", 9.0))}, {}),
]


@pytest.mark.parametrize(("client", "rest", "secure"), WITHOUT)
def test_what_does_not_go_with_it_begins_nowhere(
    client: ClientPrivacy, rest: dict[str, Any], secure: dict[str, Any]
):
    offer = offered(client, **rest, **secure)
    with pytest.raises(TaskError) as error:
        with_client_noise(offer, SIZE)
    assert error.value.code == "LF1080"
    with pytest.raises(Refused) as refused:
        client_noise(replace(offer, client_noise=100.0), SIZE)
    assert refused.value.code == "LF4630"


@pytest.mark.parametrize(
    "lie",
    [
        {"client_noise": 0.0},
        {"client_noise": -1.0},
        {"client_noise": math.nan},
        {"client_noise": math.inf},
        {"client_noise": ENDLESS},
        {"client_noise": 1e-3},
        {"client_noise": 1.0},
        {"rounds": ROUNDS + 1},
        {"rounds": 0},
        {"rounds": ENDLESS},
        {"cohort": ENDLESS},
        {"cohort": -10},
    ],
)
@pytest.mark.parametrize("client", [SHARED, SKELLAM])
def test_a_site_refuses_an_agreement_that_lies(client: ClientPrivacy, lie: dict[str, Any]):
    with pytest.raises(Refused) as refused:
        client_noise(replace(agreed(client), **lie), SIZE)
    assert refused.value.code == "LF4630"


@pytest.mark.parametrize(
    "lie",
    [
        {"epsilon": 7.9},
        {"epsilon": math.nan},
        {"epsilon": -ENDLESS},
        {"delta": 1e-6},
        {"delta": 0.0},
        {"delta": math.nan},
        {"delta": 2.0},
    ],
)
@pytest.mark.parametrize("client", [SHARED, CENTRAL])
def test_a_site_refuses_a_price_that_is_not_the_noise_s(client: ClientPrivacy, lie: dict[str, Any]):
    with pytest.raises(Refused) as refused:
        client_noise(changed(agreed(client), **lie), SIZE)
    assert refused.value.code == "LF4630"


@pytest.mark.parametrize(
    ("client", "bits", "rounds", "code"),
    [
        (replace(SHARED, epsilon=1e-9), 24, ROUNDS, "LF3321"),
        (SHARED, 16, 10**6, "LF3321"),
        (replace(CENTRAL, epsilon=1e-9), 24, 10**6, "LF3341"),
    ],
)
def test_a_target_that_no_noise_reaches_refuses(
    client: ClientPrivacy, bits: int, rounds: int, code: str
):
    offer = replace(offered(client, bits=bits), rounds=rounds)
    with pytest.raises(TaskError) as error:
        with_client_noise(offer, 200_000)
    assert error.value.code == code


def test_of_noise_by_the_coordinator_only_so_much_is_drawn():
    client = replace(CENTRAL, epsilon=1.0)
    few, many = (replace(offered(client), rounds=rounds) for rounds in (10_000, 100_000))
    agreement = with_client_noise(few, SIZE)
    assert 300 < agreement.client_noise < 512
    noise = client_noise(agreement, SIZE)
    assert noise is not None
    assert central_sum(noise, SIZE).sigma < 2.0**40
    with pytest.raises(TaskError) as error:
        with_client_noise(many, SIZE)
    assert error.value.code == "LF3341"
    with pytest.raises(Refused) as refused:
        client_noise(replace(agreement, client_noise=513.0), SIZE)
    assert refused.value.code == "LF4630"


def test_without_it_nothing_is_planned():
    offer = offered(replace(SHARED, enabled=False))
    assert with_client_noise(offer, SIZE) is offer
    assert client_noise(offer, SIZE) is None
    assert offer.norm_bound == 4.0
    assert offered().norm_bound == 0.5


def test_whom_it_holds_against_is_said():
    shared, central = client_noise(agreed(), SIZE), client_noise(agreed(CENTRAL), SIZE)
    plain = client_noise(agreed(CENTRAL, enabled=False), SIZE)
    assert shared is not None
    assert central is not None
    assert plain is not None
    assert "while 7 sites of a sum add their share" in shared.against
    assert "not against the coordinator, which reads sums without noise" in central.against
    assert "not against the coordinator, which reads single updates" in plain.against
    for noise in (shared, central, plain):
        assert "zero-out-one-site" in noise.terms
        assert noise.against in noise.terms
    with pytest.raises(ValueError, match="share no noise"):
        central.noisy_sum(1)


def test_more_vectors_than_one_are_refused():
    with pytest.raises(TaskError) as error:
        masked_layout(
            agreed(), Shape("1" * 64, (DELTA, "control"), SIZE, 0), train=True, evaluate=False
        )
    assert error.value.code == "LF3340"

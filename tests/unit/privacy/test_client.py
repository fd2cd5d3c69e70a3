"""Client-level DP of a run: what is agreed on costs what is said, and what lies is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.privacy_rules import LEAST_CLIP
from lepton_fed.config.schema import (
    ClientPrivacy,
    Privacy,
    RecordPrivacy,
    SecureAggregation,
    StrategyConf,
)
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.errors import Refused, TaskError
from lepton_fed.privacy.client import (
    client_noise,
    honest_sites,
    least_clip,
    noise_of_round,
    with_client_noise,
)
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
KINDS = [SHARED, SKELLAM, CENTRAL]


def moving(client: ClientPrivacy) -> ClientPrivacy:
    """Return the same with a norm that follows the median."""
    return replace(client, quantile=0.5)


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
    *(
        (client, {"task": Task(aggregation=Aggregation("equal", bound))}, {})
        for client in (SHARED, CENTRAL)
        for bound in (0.5, 2.0, math.nan)
    ),
    (replace(SHARED, clip=LEAST_CLIP / 2), {}, {}),
    *((replace(SHARED, quantile=quantile), {}, {}) for quantile in (0, 1, -1, ENDLESS, math.nan)),
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
    assert central_sum(noise).sigma < 2.0**40
    with pytest.raises(TaskError) as error:
        with_client_noise(many, SIZE)
    assert error.value.code == "LF3341"
    with pytest.raises(Refused) as refused:
        client_noise(replace(agreement, client_noise=513.0), SIZE)
    assert refused.value.code == "LF4630"


@pytest.mark.parametrize("client", KINDS)
def test_a_norm_that_moves_costs_what_one_coordinate_more_costs(client: ClientPrivacy):
    agreement = agreed(moving(client))
    one_more = with_client_noise(offered(client), SIZE + 1)
    assert agreement.client_noise == one_more.client_noise
    noise, other = client_noise(agreement, SIZE), client_noise(one_more, SIZE + 1)
    assert noise is not None
    assert other is not None
    assert noise.epsilon == other.epsilon
    assert noise.coordinates == other.coordinates == SIZE + 1
    # The update pays for it with 5 % more noise, and with nothing else.
    assert noise.mean_deviation(SITES) == pytest.approx(1.05 * other.mean_deviation(SITES))
    less = replace(agreement, client_noise=0.99 * agreement.client_noise)
    with pytest.raises(Refused) as refused:
        client_noise(less, SIZE)
    assert refused.value.code == "LF4630"


NORMS = [LEAST_CLIP, 1e-9, 0.1, 1 / 3, 0.5, math.nextafter(0.5, 1), 1.0, 3.9999]


@pytest.mark.parametrize("client", [SHARED, SKELLAM])
def test_a_norm_changes_nothing_of_what_a_share_hides(client: ClientPrivacy):
    """In units of the grid, to the last bit: so no norm that is told makes anything cost more."""
    noise = client_noise(agreed(moving(client)), SIZE)
    assert noise is not None
    plans = [noise.in_round(norm).shares for norm in NORMS]
    seen = set()
    for plan, norm in zip(plans, NORMS, strict=True):
        assert plan is not None
        assert plan.clip == 1.05 * norm
        assert plan.grid == pytest.approx(plan.clip / plans[0].clip * plans[0].grid)
        cost = plan.cost(ROUNDS).epsilon(client.delta)
        seen.add((plan.share_sigma, plan.norm_limit, plan.padded, cost))
    assert seen == {(plans[0].share_sigma, plans[0].norm_limit, plans[0].padded, noise.epsilon)}


def test_a_norm_changes_nothing_of_what_the_coordinator_s_noise_hides():
    noise = client_noise(agreed(moving(CENTRAL)), SIZE)
    assert noise is not None
    sums = [central_sum(noise.in_round(norm)) for norm in NORMS]
    for total in sums:
        assert total.sigma == pytest.approx(sums[0].sigma, rel=1e-12)
        longest = total.clip / total.grid + math.sqrt(SIZE + 1) / 2
        assert total.sigma / longest >= noise.noise_multiplier


@pytest.mark.parametrize("times", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("norm", NORMS)
def test_what_a_site_adds_is_within_what_its_share_hides_at_any_norm(norm: float, times: float):
    noise = client_noise(agreed(moving(SHARED)), SIZE)
    assert noise is not None
    now = noise.in_round(norm)
    assert now.shares is not None
    update = np.full(SIZE, times * norm / math.sqrt(SIZE), np.float32)
    ends = now.noisy_sum(1)
    units = ends.quantised(now.vector(update, over=True), Entropy(bytes(range(32))))
    assert int(np.square(units).sum()) <= now.shares.norm_limit
    back = ends.rotation.undo(units * now.shares.grid)[:-1]
    length = min(times, 1.0) * norm
    assert np.linalg.norm(back) == pytest.approx(length, rel=0.02, abs=0.02 * norm)


@pytest.mark.parametrize(
    "told",
    [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 5e-324, LEAST_CLIP / 2, 4.0000001, 1e308],
)
@pytest.mark.parametrize("client", KINDS)
def test_a_norm_out_of_bounds_is_refused(client: ClientPrivacy, told: float):
    noise = client_noise(agreed(moving(client)), SIZE)
    with pytest.raises(Refused) as refused:
        noise_of_round(noise, told, train=True)
    assert refused.value.code == "LF4519"
    for within in (LEAST_CLIP, 0.5, 4.0):
        now = noise_of_round(noise, within, train=True)
        assert now is not None
        assert now.clip == within


@pytest.mark.parametrize("told", [0.5, -1.0, math.nan, 5e-324])
def test_a_norm_where_none_moves_is_refused(told: float):
    fixed, following = client_noise(agreed(), SIZE), client_noise(agreed(moving(SHARED)), SIZE)
    for noise, train in ((fixed, True), (fixed, False), (following, False), (None, True)):
        with pytest.raises(Refused) as refused:
            noise_of_round(noise, told, train=train)
        assert refused.value.code == "LF4519"
        assert noise_of_round(noise, 0.0, train=train) is (fixed if train and noise else None)


def test_a_ring_that_is_too_coarse_to_count_in_refuses_to_start():
    """The grid of a masked sum is the same in all rounds, where the coordinator adds the noise."""
    shape = Shape("1" * 64, (DELTA,), SIZE, 0)
    fine = agreed(moving(CENTRAL), bits=24)
    layout = masked_layout(fine, shape, train=True, evaluate=False)
    assert layout.size == SIZE + 1
    least = least_clip(layout.encoding.grid, SIZE + 1)
    assert least == 128 * layout.encoding.grid
    assert least_clip(layout.encoding.grid, 10**6) == 1000 * layout.encoding.grid
    coarse = agreed(replace(moving(CENTRAL), clip=0.4), bits=16)
    with pytest.raises(TaskError) as error:
        masked_layout(coarse, shape, train=True, evaluate=False)
    assert error.value.code == "LF3401"
    masked_layout(agreed(moving(CENTRAL), bits=16), shape, train=True, evaluate=False)
    masked_layout(agreed(replace(CENTRAL, clip=0.4), bits=16), shape, train=True, evaluate=False)
    masked_layout(agreed(moving(SHARED), bits=16), shape, train=True, evaluate=False)
    noise = client_noise(fine, SIZE)
    assert noise is not None
    mean = np.zeros(SIZE + 1)  # nobody was over: the norm goes down as far as it may
    assert noise.in_round(least).read(mean, 10_000, layout.encoding.grid)[1] == least
    assert noise.in_round(least).read(mean, 10_000)[1] < least


def test_what_is_said_of_a_norm_that_moves_is_said_with_the_norm_of_the_round():
    noise = client_noise(agreed(moving(SHARED)), SIZE)
    assert noise is not None
    said = noise.in_round(0.25).terms
    assert "updates of norm 0.25 and on how many were longer" in said
    assert "follows the 0.5 quantile" in said
    fixed = client_noise(agreed(), SIZE)
    assert fixed is not None
    assert "quantile" not in fixed.terms


def test_without_it_nothing_is_planned():
    offer = offered(replace(SHARED, enabled=False))
    assert with_client_noise(offer, SIZE) is offer
    assert client_noise(offer, SIZE) is None


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
        assert noise.notes["client-level DP"] == noise.terms
        assert noise.notes["client-level DP holds against"] == noise.against
        assert float(noise.notes["client-level epsilon"]) == noise.epsilon
        assert float(noise.notes["client-level delta"]) == noise.delta
    with pytest.raises(ValueError, match="share no noise"):
        central.noisy_sum(1)


def test_more_vectors_than_one_are_refused():
    with pytest.raises(TaskError) as error:
        masked_layout(
            agreed(), Shape("1" * 64, (DELTA, "control"), SIZE, 0), train=True, evaluate=False
        )
    assert error.value.code == "LF3340"

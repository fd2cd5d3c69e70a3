"""A norm that follows a quantile of the updates' norms: where it goes, and what counting costs."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.privacy_rules import LEAST_CLIP
from lepton_fed.config.schema import ClientPrivacy, Privacy, SecureAggregation, StrategyConf
from lepton_fed.core.task import Aggregation, Task
from lepton_fed.privacy.client import ClientNoise, client_noise, with_client_noise
from lepton_fed.privacy.clipping import counted, fraction_within, joint_norm, moved, unit
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.server.noised import PlainSum

SPREAD = 0.7  # of the norms' logarithm
NORMAL_80 = 0.8416
CLIPS = (LEAST_CLIP, 1e-9, 0.3, 0.5, math.nextafter(1.0, 0), 1.0, math.nextafter(1.0, 2), 7.7, 1e12)


def norms_of(number: int, sites: int, median: float = 3.0) -> np.ndarray:
    draws = np.random.default_rng(number)
    return (median * np.exp(SPREAD * draws.standard_normal(sites))).astype(np.float32)


def planned(clip: float, quantile: float, sites: int, rounds: int, **client) -> ClientNoise:
    """Return the noise of a run with epsilon 8 whose updates have one coordinate."""
    secure = SecureAggregation(enabled=client.get("noise") != "coordinator")
    chosen = ClientPrivacy(enabled=True, clip=clip, quantile=quantile, **client)
    privacy = Privacy(secure_aggregation=secure, client=chosen)
    task = Task(aggregation=Aggregation(norm_bound=1e4))
    offer = Agreement("run", task, StrategyConf(), rounds, 1, privacy, sites)
    noise = client_noise(with_client_noise(offer, 1), 1)
    assert noise is not None
    return noise


def step(
    clip: float,
    within: float,
    quantile: float,
    deviation: float = 0.0,
    least: float = 1e-9,
    most: float = 1e9,
) -> float:
    return moved(clip, within, quantile, deviation=deviation, least=least, most=most)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize(("quantile", "times"), [(0.5, 1.0), (0.8, math.exp(SPREAD * NORMAL_80))])
def test_the_norm_reaches_its_quantile_from_far_away_in_60_rounds(
    start: float, quantile: float, times: float
) -> None:
    """A thousand sites, epsilon 8 for all rounds, by the very sums of a coordinator."""
    target = 3.0 * times
    noise = planned(start * target, quantile, 1000, 60, noise="coordinator")
    assert 4.5 < noise.noise_multiplier < 5.5
    path = [noise.clip]
    for number in range(60):
        total = PlainSum(noise.in_round(path[-1]))
        for norm in norms_of(number, 1000):
            total.add(np.array([norm]), float(norm))
        path.append(total.mean()[1])
    assert path[-1] == pytest.approx(target, rel=0.1)
    assert np.mean(path[-10:]) == pytest.approx(target, rel=0.1)
    # Before the noise can turn it, it goes the right way.
    steps = np.diff(path[:6])
    assert (steps > 0).all() if start < 1 else (steps < 0).all()


def test_it_does_so_from_sums_in_a_ring_too() -> None:
    """Each of two hundred sites adds its share; the noise on the fraction is six times as large."""
    sites, draws = 200, np.random.default_rng(0)
    noise = planned(30.0, 0.5, sites, 60, honest=140)
    assert noise.shares is not None
    path = [noise.clip]
    for number in range(60):
        now = noise.in_round(path[-1])
        ends, entropy = now.noisy_sum(number + 1), Entropy(draws.bytes(32))
        total = np.zeros(noise.shares.padded, np.uint64)
        for norm in norms_of(number, sites):
            vector = now.vector(np.array([norm]), over=bool(norm > now.clip))
            total += ends.encode(vector, entropy)
        path.append(now.read(ends.decode(total) / sites, sites)[1])
    assert np.mean(path[-20:]) == pytest.approx(3.0, rel=0.25)


def test_one_step_is_the_papers_rule() -> None:
    for quantile, rate in ((0.5, 0.2), (0.8, 0.5), (0.9, 1.0), (0.25, 0.4)):
        for within in (0.0, 0.3, 0.5, 1.0):
            found = step(2.0, within, quantile)
            assert found == pytest.approx(2.0 * math.exp(-rate * (within - quantile)), rel=1e-12)


def test_a_norm_that_is_right_stays_and_noise_moves_it_no_further_than_a_bound() -> None:
    assert step(2.0, 0.5, 0.5) == 2.0
    for noised, factor in ((1e9, 1 / math.e), (-1e9, math.e), (40.0, 1 / math.e)):
        assert step(2.0, noised, 0.5) == pytest.approx(2.0 * factor)
    assert step(2.0, 1e9, 0.5, least=1.5) == 1.5
    assert step(2.0, -1e9, 0.5, most=3.0) == 3.0
    assert step(LEAST_CLIP, 1.0, 0.5, least=0.0) == LEAST_CLIP


@pytest.mark.parametrize("quantile", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("deviation", [0.16, 1.6, 10.0])
def test_noise_does_not_make_the_norm_stray_from_the_quantile(
    quantile: float, deviation: float
) -> None:
    """Ten sites, whose count says next to nothing: with the paper's rate it strays by hundreds."""
    draws = np.random.default_rng(7)
    found = []
    for _ in range(20):
        clip = target = 3.0 * math.exp(SPREAD * NormalDist().inv_cdf(quantile))
        for _ in range(300):
            within = float((norms_of(int(draws.integers(2**31)), 10) <= clip).mean())
            within += deviation * draws.standard_normal()
            clip = step(clip, within, quantile, deviation=deviation, least=1e-15, most=1e15)
            found.append(abs(math.log(clip / target)))
    assert np.quantile(found, 0.75) < math.log(2)
    assert np.quantile(found, 0.99) < math.log(6)


def test_little_noise_does_not_slow_the_norm_down() -> None:
    for quantile in (0.1, 0.5, 0.9):
        fast = 2.0 * math.exp(-0.1 / min(quantile, 1 - quantile) * (1 - quantile))
        assert step(2.0, 1.0, quantile, deviation=0.2) == pytest.approx(fast)
        assert fast < step(2.0, 1.0, quantile, deviation=2.0) < 2.0


@pytest.mark.parametrize("clip", CLIPS)
def test_what_counts_an_update_is_the_same_number_everywhere(clip: float) -> None:
    number = unit(clip)
    assert float(np.float32(number)) == number
    grid = math.ldexp(1.0, math.frexp(clip)[1] - 7)
    assert clip / grid <= 128
    assert math.fmod(number, grid) == 0
    # Not much smaller than the cost allows for: the noise on the count would be larger.
    assert 0.95 * math.sqrt(joint_norm(clip) ** 2 - clip**2) < number


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("times", [0.0, 0.5, 1 - 1e-7, 1.0, 1 + 1e-6, 40.0])
def test_an_update_and_its_number_are_no_longer_than_the_noise_is_made_for(
    clip: float, times: float
) -> None:
    update = np.full(1000, times * clip / math.sqrt(1000), np.float32)
    for over in (False, True):
        vector = counted(update, clip, over=over)
        assert vector.dtype == np.float32
        assert vector.shape == (1001,)
        assert np.linalg.norm(vector.astype(np.float64)) <= joint_norm(clip)
        assert np.linalg.norm(vector[:-1].astype(np.float64)) <= clip
        assert vector[-1] == (unit(clip) if over else 0.0)


def test_the_fraction_is_that_of_the_updates() -> None:
    for over, sites in ((0, 10), (3, 10), (10, 10), (1, 1000)):
        assert fraction_within(over * unit(1.7) / sites, 1.7) == pytest.approx(1 - over / sites)


@pytest.mark.parametrize("noise", ["shared", "coordinator"])
def test_the_noise_on_the_fraction_is_as_large_as_is_said(noise: str) -> None:
    sites, found = 20, []
    plan = planned(
        1.0, 0.5, sites, 10, noise=noise, **({"honest": 14} if noise == "shared" else {})
    )
    for number in range(300):
        if noise == "coordinator":
            total = PlainSum(plan)
            for _ in range(sites):
                total.add(np.zeros(1, np.float32), 0.0)
            mean = total._sum.released_sum(Entropy.from_system()) / sites
        else:
            ends, entropy = plan.noisy_sum(number + 1), Entropy.from_system()
            words = sum(
                ends.encode(plan.vector(np.zeros(1, np.float32), over=False), entropy)
                for _ in range(sites)
            )
            mean = ends.decode(words) / sites
        found.append(fraction_within(float(mean[-1]), 1.0))
    wanted = plan.fraction_deviation(sites)
    assert np.std(found) == pytest.approx(wanted, rel=5 / math.sqrt(600))
    assert np.mean(found) == pytest.approx(1.0, abs=5 * wanted / math.sqrt(300))

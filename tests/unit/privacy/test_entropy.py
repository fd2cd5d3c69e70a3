"""The noise's source: known answers, the right distribution, and no way to seed it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from lepton_fed.privacy.dp.entropy import Entropy

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "entropy.json").read_text())
KEY = bytes.fromhex(VECTORS["key"])
BLOCK = 1 << 14  # pairs of Gaussian numbers that are made at once
RARE_KEY = (39).to_bytes(32, "big")
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # the Gaussian is made in float32, the naive one in float64


class Naive:
    """The stream again, block by block: AES of a counter, in plain Python numbers."""

    def __init__(self, key):
        self.block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update  # noqa: S305
        self.taken = 0

    def words(self, count):
        found = []
        for index in range(self.taken, self.taken + count):
            block = self.block((index // 2).to_bytes(16, "big"))
            found.append(int.from_bytes(block[8 * (index % 2) :][:8], "little"))
        self.taken += count
        return found

    def uniform(self, count):
        return [(word >> 11) / 2**53 for word in self.words(count)]

    def normal(self, count):
        found = []
        while count > len(found):
            found += self.block_of_normals(min(BLOCK, -(-(count - len(found)) // 2)))
        return found[:count]  # of an odd count the last sine is left out, at the very end

    def block_of_normals(self, pairs):
        halves = [half for word in self.words(pairs) for half in (word & 0xFFFFFFFF, word >> 32)]
        # Rounded to float32 as there: near a radius of zero that is all the error.
        uniform = [float(np.float32(half) + np.float32(0.5)) / 2**32 for half in halves[:pairs]]
        for rare in (n for n in range(pairs) if halves[n] < 2**12):
            uniform[rare] = (halves[rare] + self.uniform(1)[0] + 2**-54) / 2**32
        radius = [math.sqrt(-2 * math.log(u)) for u in uniform]
        angle = [2 * math.pi * half / 2**32 for half in halves[pairs:]]
        both = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        return both + [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]


@pytest.mark.parametrize("stream", [Naive, Entropy])
def test_both_implementations_give_the_committed_answers(stream):
    words = [f"{int(word):016x}" for word in stream(KEY).words(8)]
    assert words == VECTORS["words"]
    assert list(stream(KEY).uniform(8)) == VECTORS["uniform"]
    np.testing.assert_allclose(stream(KEY).normal(7), VECTORS["normal"], **CLOSE)


def test_words_are_the_keystream_of_aes_in_counter_mode():
    keystream = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(400))
    assert Entropy(KEY).words(50).astype("<u8").tobytes() == keystream


def test_draws_of_any_kind_and_size_go_on_where_the_last_one_ended():
    ours, naive = Entropy(KEY), Naive(KEY)
    for kind, count in (("words", 3), ("normal", 5), ("uniform", 1), ("normal", 0), ("words", 6)):
        found = np.asarray(getattr(ours, kind)(count), dtype=np.float64)
        np.testing.assert_allclose(found, getattr(naive, kind)(count), **CLOSE)


def test_types_and_sizes_are_as_promised():
    stream = Entropy(KEY)
    assert (stream.words(3).dtype, stream.words(0).shape) == (np.uint64, (0,))
    assert (stream.uniform(3).dtype, stream.uniform(4).shape) == (np.float64, (4,))
    assert (stream.normal(3).dtype, stream.normal(5).shape) == (np.float32, (5,))


def test_uniform_numbers_are_uniform():
    draws = Entropy(KEY).uniform(200_000)
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 0.01
    # Neighbours are independent: pairs fall evenly into 16 x 16 cells.
    cells = np.histogram2d(draws[::2], draws[1::2], bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 0.01


SEVERAL_BLOCKS = 3 * 2 * BLOCK + 1000
"""Three whole blocks and a part of one."""


def test_blocks_rare_radii_and_odd_counts_are_those_of_the_naive_one():
    ours, naive = Entropy(RARE_KEY), Naive(RARE_KEY)
    radii = np.frombuffer(Entropy(RARE_KEY).words(BLOCK + 1).tobytes()[8:], "<u4")[:BLOCK]
    assert (radii < 2**12).any(), "one in a million needs more bits; in the second draw one is"
    for count in (1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, SEVERAL_BLOCKS + 1, 3):
        np.testing.assert_allclose(ours.normal(count), naive.normal(count), **CLOSE)


def test_normal_numbers_are_normal():
    draws = Entropy(KEY).normal(4_000_000).astype(np.float64)
    size = math.sqrt(len(draws))
    assert abs(draws.mean()) < 3 / size
    assert abs(draws.std() - 1) < 3 / size / math.sqrt(2)
    assert abs(stats.skew(draws)) < 3 * math.sqrt(6) / size
    assert abs(stats.kurtosis(draws)) < 3 * math.sqrt(24) / size
    assert stats.kstest(draws[:1_000_000], "norm").pvalue > 0.01
    cells = np.histogram(stats.norm.cdf(draws), bins=256, range=(0, 1))[0]
    assert stats.chisquare(cells).pvalue > 0.01


def test_the_tails_have_the_mass_of_a_gaussian():
    draws = Entropy(KEY).normal(4_000_000)
    for far in (3.0, 4.0, 4.5):
        expected = len(draws) * stats.norm.sf(far)
        for found in (int((draws > far).sum()), int((draws < -far).sum())):
            assert abs(found - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("lag", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_numbers_of_a_pair_and_of_other_blocks_are_independent(lag):
    """Cosine and sine of a pair lie a block of pairs apart, other blocks two."""
    draws = Entropy(KEY).normal(64 * 2 * BLOCK).astype(np.float64)
    for power in (1, 2, 3):
        one, other = draws[:-lag] ** power, draws[lag:] ** power
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(len(one))


def test_pairs_point_in_every_direction_alike():
    draws = Entropy(KEY).normal(2 * BLOCK).astype(np.float64)
    cosine, sine = np.split(draws, 2)
    turns = np.arctan2(sine, cosine) / (2 * math.pi) % 1
    assert stats.kstest(turns, "uniform").pvalue > 0.01
    assert stats.kstest(np.hypot(cosine, sine), "rayleigh").pvalue > 0.01


class Words:
    """A cipher whose keystream is one 32-bit word again and again."""

    def __init__(self, word):
        self.bytes = word.to_bytes(4, "little")

    def update(self, data):
        return self.bytes * (len(data) // 4)

    def update_into(self, data, into):
        into[: len(data)] = self.update(data)


@pytest.mark.parametrize(
    ("word", "radius"),
    [
        (
            0,
            math.sqrt(2 * 86 * math.log(2)),
        ),  # 32-bit uniforms would end at 6.8, 53-bit ones at 8.5
        (2**12, math.sqrt(-2 * math.log((2**12 + 0.5) / 2**32))),
        (2**32 - 1, 0.0),
    ],
)
def test_the_tail_is_not_cut_off_early_and_the_middle_is_harmless(word, radius):
    stream = Entropy(KEY)
    stream._stream = Words(word)
    assert np.hypot(*stream.normal(2)) == pytest.approx(radius, rel=1e-6)


def test_noise_is_added_in_place_and_scaled():
    shape = (37, 1001)  # an odd count, in two blocks
    out = np.full(shape, 3.0, np.float32)
    Entropy(KEY).add_normal(out, 2.5)
    expected = 3.0 + 2.5 * Entropy(KEY).normal(37 * 1001).reshape(shape)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_each_call_adds_other_noise_and_no_noise_changes_nothing():
    stream = Entropy(KEY)
    once, twice, never = (np.zeros(7, np.float32) for _ in range(3))
    stream.add_normal(once, 1.0)
    stream.add_normal(twice, 1.0)
    stream.add_normal(never, 0.0)
    assert not np.isclose(once, twice).any()
    assert not never.any()


def test_streams_that_are_used_at_once_do_not_touch_each_other():
    size = 20 * 2 * BLOCK
    keys = [bytes([n]) * 32 for n in range(4)]
    alone = [Entropy(key).normal(size) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: Entropy(key).normal(size), keys))
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e-46, 6e-46, 1e38])
def test_a_standard_deviation_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match="standard deviation"):
        Entropy(KEY).add_normal(np.zeros(3, np.float32), std)


def test_float64_gets_the_same_numbers_added_without_rounding_the_sum():
    one, other = (Entropy.insecurely_seeded(3, "a") for _ in range(2))
    narrow, wide = np.zeros(70_001, np.float32), np.full(70_001, 1e8)
    one.add_normal(narrow, 2.0)
    other.add_normal(wide, 2.0)
    assert np.array_equal(wide, 1e8 + narrow.astype(np.float64))


@pytest.mark.parametrize(
    "out", [np.zeros(3, np.float16), np.zeros(6, np.float32)[::2], np.zeros(3, np.int32)]
)
def test_what_noise_cannot_be_added_to_in_place_is_refused(out):
    with pytest.raises(ValueError, match="contiguous float32 or float64"):
        Entropy(KEY).add_normal(out, 1.0)


def test_an_order_holds_every_number_once_and_each_order_is_as_likely():
    orders = {}
    stream = Entropy(KEY)
    for _ in range(6000):
        order = tuple(stream.permutation(4).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert stats.chisquare(list(orders.values())).pvalue > 0.01
    assert stream.permutation(0).shape == (0,)


def test_a_seeded_stream_says_that_it_is_insecure_and_repeats():
    one, again = (Entropy.insecurely_seeded(1, "a").words(8).tolist() for _ in range(2))
    others = [Entropy.insecurely_seeded(*of).words(8).tolist() for of in ((2, "a"), (1, "b"))]
    assert one == again
    assert one not in others
    assert others[0] != others[1]
    assert Entropy.insecurely_seeded(1, "a").insecure
    assert not Entropy.from_system().insecure


def test_no_two_streams_of_the_system_are_alike():
    with_seed = []
    for _ in range(3):
        np.random.seed(0)  # noqa: NPY002 - what an attacker would try
        with_seed.append(Entropy.from_system().words(4).tobytes())
    assert len(set(with_seed)) == 3


def test_the_key_of_the_system_is_whole(monkeypatch):
    asked = []

    def urandom(count):
        asked.append(count)
        return KEY[:count]

    monkeypatch.setattr("lepton_fed.privacy.dp.entropy.os.urandom", urandom)
    assert Entropy.from_system().words(8).tolist() == Entropy(KEY).words(8).tolist()
    assert asked == [32]


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} bytes, not 32"):
        Entropy(bytes(length))

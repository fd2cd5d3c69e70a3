"""The noise's source: known answers, the right distribution, and no way to seed it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from lepton_fed.privacy.dp.entropy import Entropy

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "entropy.json").read_text())
KEY = bytes.fromhex(VECTORS["key"])


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
        pairs = -(-count // 2)
        numbers = self.uniform(2 * pairs)
        radius = [math.sqrt(-2 * math.log1p(-u)) for u in numbers[:pairs]]
        angle = [2 * math.pi * u for u in numbers[pairs:]]
        both = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        both += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
        return both[:count]


@pytest.mark.parametrize("stream", [Naive, Entropy])
def test_both_implementations_give_the_committed_answers(stream):
    words = [f"{int(word):016x}" for word in stream(KEY).words(8)]
    assert words == VECTORS["words"]
    assert list(stream(KEY).uniform(8)) == VECTORS["uniform"]
    np.testing.assert_allclose(stream(KEY).normal(7), VECTORS["normal"], rtol=2e-7)


def test_words_are_the_keystream_of_aes_in_counter_mode():
    keystream = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(400))
    assert Entropy(KEY).words(50).astype("<u8").tobytes() == keystream


def test_draws_of_any_kind_and_size_go_on_where_the_last_one_ended():
    ours, naive = Entropy(KEY), Naive(KEY)
    for kind, count in (("words", 3), ("normal", 5), ("uniform", 1), ("normal", 0), ("words", 6)):
        found = np.asarray(getattr(ours, kind)(count), dtype=np.float64)
        np.testing.assert_allclose(found, getattr(naive, kind)(count), rtol=2e-7)


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


def test_normal_numbers_are_normal():
    draws = Entropy(KEY).normal(200_000).astype(np.float64)
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert draws.std() == pytest.approx(1, abs=0.005)
    assert abs(stats.kurtosis(draws)) < 0.05
    # The two halves come from the same pairs of uniforms, as cosine and sine.
    first, second = np.split(draws, 2)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.01


def test_the_tail_is_not_cut_off_early():
    """53-bit uniforms reach 8.5 standard deviations; 32-bit ones would end at 6.7."""

    class Extreme(Entropy):
        def words(self, count):
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    assert Extreme(KEY).normal(2)[0] == pytest.approx(math.sqrt(2 * 53 * math.log(2)), rel=1e-6)


def test_a_uniform_of_zero_is_harmless():
    class Zero(Entropy):
        def words(self, count):
            return np.zeros(count, dtype=np.uint64)

    assert Zero(KEY).normal(4).tolist() == [0, 0, 0, 0]


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

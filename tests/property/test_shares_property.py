"""Sums of shares: exact in the ring, in whatever order, for whatever plan."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.errors import TaskError
from lepton_fed.privacy.distributed.plan import SharesPlan
from lepton_fed.privacy.distributed.rotation import Rotation
from lepton_fed.privacy.distributed.shares import NoisySum
from lepton_fed.privacy.dp.entropy import Entropy


@settings(max_examples=60, deadline=None)
@given(
    sites=st.integers(1, 8),
    size=st.integers(1, 600),
    bits=st.integers(10, 32),
    noise_multiplier=st.floats(0.05, 50),
    clip=st.floats(1e-3, 1e3),
    length=st.floats(0, 1e4),
    noise=st.sampled_from(["discrete-gaussian", "skellam"]),
    seed=st.integers(0, 2**32),
)
def test_a_sum_is_what_sites_put_into_it(
    sites, size, bits, noise_multiplier, clip, length, noise, seed
):
    random = np.random.default_rng(seed)
    honest = int(random.integers(1, sites + 1))
    try:
        plan = SharesPlan(sites, honest, size, clip, noise_multiplier, bits, noise=noise)
    except TaskError:
        return  # too small a ring, which is said before round 1
    except ValueError:
        assert noise == "skellam"
        assert bits > 28
        return
    ends = NoisySum(plan, Rotation.of_round(seed, 1, size))
    updates = random.standard_normal((sites, size)) * length / np.sqrt(size)
    words, units = [], np.zeros(plan.padded, dtype=np.int64)
    for site, update in enumerate(updates):
        key = bytes([site + 1]) * 32
        words.append(ends.encode(update, Entropy(key)))
        again = Entropy(key)
        quantised = ends.quantised(update, again)
        units += quantised + ends.share(again)
        assert sum(int(value) ** 2 for value in quantised) <= plan.squared_sensitivity
        kept = update * min(1, clip / max(np.linalg.norm(update), 1e-300))
        back = ends.rotation.undo(quantised * plan.grid)
        assert np.abs(back - kept).max() <= np.sqrt(plan.block) * plan.grid * (1 + 1e-6)
    forwards, backwards = sum(words), sum(reversed(words))
    np.testing.assert_array_equal(ends.decode(forwards), ends.decode(backwards))
    half = 1 << (bits - 1)
    np.testing.assert_array_equal(ends.from_ring(forwards), (units + half) % (2 * half) - half)

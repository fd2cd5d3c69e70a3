"""The public rotation: orthogonal, linear, flattening, and the same for everybody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from lepton_fed.privacy.distributed.rotation import Rotation, block_of


def rotation(size, seed=1, round_number=1):
    return Rotation.of_round(seed, round_number, size)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100, 512])
def test_it_is_signs_and_a_hadamard_matrix(size):
    some = rotation(size)
    matrix = np.stack([some.apply(row) for row in np.eye(size)], axis=1)
    plain = hadamard(some.block)[:, :size] / np.sqrt(some.block)
    signs = matrix[0] / plain[0]
    np.testing.assert_allclose(np.abs(signs), 1)
    np.testing.assert_allclose(matrix, plain * signs, atol=1e-15)
    if size >= 100:
        assert 0.3 < np.mean(signs > 0) < 0.7


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 30_000), seed=st.integers(0, 2**62))
def test_it_keeps_norms_and_comes_back(size, seed):
    some = rotation(size, seed)
    update = np.random.default_rng(seed).standard_normal(size)
    rotated = some.apply(update)
    assert rotated.shape == (some.padded,)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(update))
    np.testing.assert_allclose(some.undo(rotated), update, atol=1e-12)


def test_it_is_linear():
    some = rotation(5000)
    one, other = np.random.default_rng(0).standard_normal((2, 5000))
    both = some.apply(one) - 3 * some.apply(other)
    np.testing.assert_allclose(both, some.apply(one - 3 * other), atol=1e-12)


def test_a_single_coordinate_is_spread_over_its_block():
    some = rotation(100_000)
    update = np.zeros(100_000)
    update[77] = 5.0
    rotated = np.abs(some.apply(update))
    np.testing.assert_allclose(rotated[: some.block], 5.0 / np.sqrt(some.block))
    assert not rotated[some.block :].any()


@pytest.mark.parametrize(
    ("size", "padded"), [(20_000, 20_480), (1_663_370, 1_703_936), (10_000_000, 10_027_008)]
)
def test_padding_stays_small(size, padded):
    assert rotation(size).padded == padded
    assert padded <= 1.05 * size


def test_blocks_are_powers_of_two_and_padding_is_bounded():
    for size in [*range(1, 300), *range(4000, 140_000, 997)]:
        block = block_of(size)
        assert block & (block - 1) == 0
        assert block <= 65536
        assert -size % block <= max(0.05 * size, 4095)


def test_everybody_derives_the_same_and_rounds_differ():
    update = np.random.default_rng(0).standard_normal(300)
    np.testing.assert_array_equal(rotation(300).apply(update), rotation(300).apply(update))
    assert np.abs(rotation(300).apply(update) - rotation(300, 1, 2).apply(update)).max() > 0.1
    assert np.abs(rotation(300).apply(update) - rotation(300, 2).apply(update)).max() > 0.1


def test_float32_is_taken_and_other_shapes_are_not():
    some = rotation(300)
    assert some.apply(np.ones(300, dtype=np.float32)).dtype == np.float64
    for wrong in (np.ones(299), np.ones((300, 1))):
        with pytest.raises(ValueError, match="shape"):
            some.apply(wrong)
    with pytest.raises(ValueError, match="shape"):
        some.undo(np.ones(300))
    with pytest.raises(ValueError, match="0 coordinates"):
        block_of(0)

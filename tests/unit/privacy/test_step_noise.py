"""Both kinds of step noise: where they put it, and that neither is ever left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import CorrelatedSteps, IndependentSteps, add_noise
from lepton_fed.privacy.factorisation.mechanism import BandedMechanism

KEY = bytes(range(32))
SHAPES = [(3, 4), (5,), (2, 2, 7)]
MECHANISM = BandedMechanism(9, 3, 3, 4)


def sums(device="cpu"):
    count = iter(range(100))
    return [torch.full(shape, float(next(count)), device=device) for shape in SHAPES]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()


def stream(size=45, past=None):
    return MECHANISM.noise(size, 0.5, 2.0, Entropy(KEY), past)


def test_independent_noise_is_what_is_added_to_each_parameter():
    found, expected, entropy = sums(), sums(), Entropy(KEY)
    IndependentSteps(1.5, Entropy(KEY)).add(found)
    for total in expected:
        add_noise(total, 1.5, entropy)
    assert flat(found).tobytes() == flat(expected).tobytes()
    silent = sums()
    IndependentSteps(0.0, Entropy(KEY)).add(silent)
    assert (flat(silent) == flat(sums())).all()


def test_correlated_noise_is_one_stream_over_all_parameters():
    steps, expected = CorrelatedSteps(stream()), stream()
    for _ in range(9):
        found = sums()
        steps.add(found)
        assert (flat(found) == flat(sums()) + expected.next()).all()
    with pytest.raises(ValueError, match="more than 9 steps"):
        steps.add(sums())


def test_sums_that_are_laid_out_otherwise_get_the_same_noise():
    turned = [torch.zeros(9, 5).T]
    plain = [torch.zeros(5, 9)]
    CorrelatedSteps(stream()).add(turned)
    CorrelatedSteps(stream()).add(plain)
    assert not turned[0].is_contiguous()
    assert torch.equal(turned[0], plain[0])


@pytest.mark.parametrize("size", [44, 46])
def test_noise_for_another_model_is_refused(size):
    with pytest.raises(ValueError, match=f"for {size} coordinates"):
        CorrelatedSteps(stream(size)).add(sums())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_noise_is_the_same():
    here, there = CorrelatedSteps(stream()), CorrelatedSteps(stream())
    for _ in range(9):
        one, other = sums(), sums("cuda")
        here.add(one)
        there.add(other)
        assert {total.device.type for total in other} == {"cuda"}
        np.testing.assert_array_equal(flat(one), flat(other))

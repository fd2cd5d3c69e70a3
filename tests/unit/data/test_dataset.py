"""Rows in memory."""

import numpy as np

from lepton_fed.data.dataset import Dataset

INPUTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_taking_rows_keeps_their_order_and_their_targets():
    taken = Dataset(INPUTS, np.array([5, 6, 7, 8])).take(np.array([3, 0]))
    assert taken.inputs.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert taken.targets.tolist() == [8, 5]


def test_rows_without_targets_can_be_taken_too():
    unlabelled = Dataset(INPUTS, np.empty(0, np.int64))
    assert not unlabelled.labelled
    taken = unlabelled.take(np.array([1]))
    assert taken.inputs.tolist() == [[3, 4, 5]]
    assert len(taken.targets) == 0
    assert not taken.labelled


def test_the_digest_tells_contents_types_and_shapes_apart():
    targets = np.zeros(4, np.int64)
    sets = [
        Dataset(INPUTS, targets),
        Dataset(INPUTS + 1, targets),
        Dataset(INPUTS.astype(np.float64), targets),
        Dataset(INPUTS.reshape(4, 1, 3), targets),
        Dataset(INPUTS, targets[:0]),
        Dataset(INPUTS, targets.astype(np.float32)),
    ]
    assert len({each.digest for each in sets}) == len(sets)


def test_the_digest_does_not_depend_on_how_rows_lie_in_memory():
    targets = np.zeros(4, np.int64)
    fortran = np.asfortranarray(INPUTS)
    assert Dataset(fortran, targets).digest == Dataset(INPUTS, targets).digest

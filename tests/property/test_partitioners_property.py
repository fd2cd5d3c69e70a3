"""Whatever the data and the arguments, a partition is one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.config.schema import Partition
from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.partitioners import partition, split_held_out
from lepton_fed.errors import DataError

CONTRACT = DataContract(columns=[Column("x")], target=Target(classes=["a", "b", "c"]))

SPECS = st.one_of(
    st.just(Partition("iid")),
    st.builds(
        lambda alpha, minimum: Partition("dirichlet", {"alpha": alpha, "minimum": minimum}),
        st.floats(1e-3, 1e6),
        st.integers(1, 4),
    ),
    st.builds(lambda per_site: Partition("shards", {"per_site": per_site}), st.integers(1, 4)),
    st.builds(
        lambda alpha, minimum: Partition("quantity", {"alpha": alpha, "minimum": minimum}),
        st.floats(1e-3, 1e6),
        st.integers(1, 4),
    ),
    st.just(Partition("column", {"column": "x"})),
)


@st.composite
def datasets(draw):
    rows = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**32))
    draws = np.random.default_rng(seed)
    inputs = draws.integers(0, draw(st.integers(1, 60)), (rows, 1)).astype(np.float32)
    inputs[draws.random(rows) < draw(st.sampled_from([0, 0.2]))] = np.nan
    if draw(st.booleans()):
        return Dataset(inputs, draws.integers(0, draw(st.integers(1, 3)), rows))
    return Dataset(inputs, np.round(draws.normal(size=rows), 1).astype(np.float32))


@settings(max_examples=300, deadline=None)
@given(datasets(), SPECS, st.integers(1, 12), st.integers(0, 2**32))
def test_every_row_is_at_exactly_one_site_and_every_site_has_its_rows(dataset, spec, sites, seed):
    try:
        parts = partition(dataset, CONTRACT, spec, sites, np.random.default_rng(seed))
    except DataError as error:
        code = error.code
    else:
        code = ""
    # Only what cannot be done is refused; Dirichlet alone may also run out of draws.
    minimum = spec.arguments.get("minimum", spec.arguments.get("per_site", 1))
    values = len(np.unique(dataset.inputs))
    if len(dataset) < sites * minimum:
        assert code == "LF2050"
    elif spec.name == "column" and values < sites:
        assert code == "LF2053"
    else:
        assert code == "" or (code == "LF2052" and spec.name == "dirichlet")
    if code:
        return
    assert len(parts) == sites
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(dataset)))
    for rows in parts:
        assert rows.dtype == np.int64
        assert len(rows) >= spec.arguments.get("minimum", 1)
        assert (np.diff(rows) > 0).all()
    again = partition(dataset, CONTRACT, spec, sites, np.random.default_rng(seed))
    for rows, same in zip(parts, again, strict=True):
        np.testing.assert_array_equal(rows, same)


@settings(max_examples=200, deadline=None)
@given(datasets(), st.integers(1, 12), st.integers(0, 2**32))
def test_rows_of_one_value_are_never_separated_and_sites_ascend(dataset, sites, seed):
    spec = Partition("column", {"column": "x"})
    try:
        parts = partition(dataset, CONTRACT, spec, sites, np.random.default_rng(seed))
    except DataError:
        return
    values = [np.unique(dataset.inputs[rows]) for rows in parts]
    in_order = np.concatenate(values)
    assert len(in_order) == len(np.unique(dataset.inputs))
    finite = in_order[~np.isnan(in_order)]
    assert (np.diff(finite) > 0).all()
    assert not np.isnan(in_order[: len(finite)]).any()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 60),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 5, 60]),
    st.booleans(),
)
def test_held_out_rows_and_training_rows_are_a_partition(count, fraction, seed, classes, labelled):
    draws = np.random.default_rng(seed)
    rows = draws.permutation(1000)[:count]
    targets = draws.integers(0, classes, count)
    train, held = split_held_out(rows, fraction, draws, targets if labelled else None)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.sort(rows))
    assert len(train) >= min(count, 1)
    if count >= 2 and fraction > 0:
        assert len(held) == min(max(round(fraction * count), 1), count - 1)
    else:
        assert len(held) == 0
    if labelled:
        sizes = np.bincount(targets, minlength=classes)
        of_row = np.zeros(1000, np.int64)
        of_row[rows] = targets
        taken = np.bincount(of_row[held], minlength=classes)
        shared = sizes[sizes > 1].sum()
        if len(held) < shared:
            assert not taken[sizes == 1].any()
            assert (abs(taken - sizes * len(held) / shared)[sizes > 1] < 1).all()

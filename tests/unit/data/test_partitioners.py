"""What each partitioner is for, and what it refuses."""

import numpy as np
import pytest

from lepton_fed.config import plugins
from lepton_fed.config.schema import Partition
from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data import partitioners
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.partitioners import partition, split_held_out
from lepton_fed.errors import ConfError, DataError, TaskError

CLASSES = 5
CONTRACT = DataContract(
    columns=[
        Column("age"),
        Column("ward", kind="category", values=["north", "south", "west"]),
    ],
    target=Target(classes=[f"class {n}" for n in range(CLASSES)]),
)


def dataset(rows=1000, targets=None):
    draws = np.random.default_rng(0)
    inputs = np.stack([draws.integers(0, 90, rows), draws.integers(0, 3, rows)], axis=1)
    labels = draws.integers(0, CLASSES, rows)
    return Dataset(inputs.astype(np.float32), labels if targets is None else targets)


def split(data, name, sites, seed=1, **arguments):
    spec = Partition(name, arguments)
    return partition(data, CONTRACT, spec, sites, np.random.default_rng(seed))


def problem_of(kind, *given, **arguments):
    with pytest.raises(kind) as caught:
        split(*given, **arguments)
    (problem,) = caught.value.problems
    return problem


def shares(data, parts):
    """Return the share of each class at each site, ``[sites, classes]``."""
    counts = [np.bincount(data.targets[rows], minlength=CLASSES) for rows in parts]
    return np.array([count / count.sum() for count in counts])


def test_iid_sites_have_the_same_size_and_mixture():
    data = dataset(10_001)
    parts = split(data, "iid", 4)
    assert sorted(len(rows) for rows in parts) == [2500, 2500, 2500, 2501]
    assert np.abs(shares(data, parts) - 0.2).max() < 0.04
    assert not np.array_equal(parts[0], np.arange(2501))


def test_dirichlet_goes_from_one_class_a_site_to_even_mixtures():
    data = dataset(10_000)
    skewed = shares(data, split(data, "dirichlet", 4, alpha=0.05)).max(axis=1).mean()
    even = shares(data, split(data, "dirichlet", 4, alpha=1000)).max(axis=1).mean()
    assert skewed > 0.5
    assert even < 0.25


def test_dirichlet_keeps_its_minimum():
    for seed in range(20):
        parts = split(dataset(200), "dirichlet", 8, seed, alpha=0.3, minimum=5)
        assert min(len(rows) for rows in parts) >= 5


def test_dirichlet_bins_numbers_by_their_size():
    numbers = np.random.default_rng(3).normal(size=2000).astype(np.float32)
    data = dataset(2000, numbers)

    def spread(alpha):
        splits = [split(data, "dirichlet", 4, seed, alpha=alpha) for seed in range(10)]
        return np.mean([np.ptp([numbers[rows].mean() for rows in parts]) for parts in splits])

    assert spread(0.05) > 5 * spread(1000)


def test_dirichlet_says_what_to_change_when_no_draw_will_do():
    problem = problem_of(DataError, dataset(100), "dirichlet", 40, alpha=0.01)
    assert (problem.code, problem.key) == ("LF2052", "sites.partition.arguments.alpha")
    assert problem.remedy == "raise alpha, or lower the number of sites or `minimum`"


def test_shards_give_a_site_few_classes():
    labels = np.repeat(np.arange(CLASSES), 40)
    data = dataset(200, np.random.default_rng(0).permutation(labels))
    parts = split(data, "shards", 10, per_site=1)
    assert [len(rows) for rows in parts] == [20] * 10
    assert all(len(np.unique(data.targets[rows])) == 1 for rows in parts)
    two = split(data, "shards", 10)
    assert all(len(np.unique(data.targets[rows])) <= 2 for rows in two)
    assert any(len(np.unique(data.targets[rows])) == 2 for rows in two)


def test_shards_mix_the_rows_of_one_class():
    data = dataset(100, np.zeros(100, np.int64))
    assert not any(np.ptp(rows) == 49 for rows in split(data, "shards", 2, per_site=1))


def test_quantity_skews_sizes_and_leaves_mixtures_alone():
    data = dataset(20_000)
    parts = split(data, "quantity", 4, alpha=0.5)
    sizes = np.array([len(rows) for rows in parts])
    assert sizes.max() > 2 * sizes.min()
    assert np.abs(shares(data, [rows for rows in parts if len(rows) > 1000]) - 0.2).max() < 0.05
    assert min(len(rows) for rows in split(data, "quantity", 50, alpha=0.001, minimum=7)) >= 7


def test_a_column_of_as_many_values_as_sites_gives_each_site_one():
    data = dataset()
    for site, rows in enumerate(split(data, "column", 3, column="ward")):
        assert set(data.inputs[rows, 1]) == {site}


def test_a_column_of_many_values_is_cut_into_runs_of_about_equal_size():
    data = dataset(9000)
    parts = split(data, "column", 4, column="age")
    ends = [(data.inputs[rows, 0].min(), data.inputs[rows, 0].max()) for rows in parts]
    assert all(ends[site][1] < ends[site + 1][0] for site in range(3))
    assert all(abs(len(rows) - 2250) < 100 for rows in parts)


def test_a_value_that_fills_most_rows_leaves_every_site_a_value():
    data = dataset(100)
    data.inputs[:, 0] = 1
    data.inputs[:3, 0] = [0, 2, np.nan]
    sizes = [len(rows) for rows in split(data, "column", 4, column="age")]
    assert sizes == [1, 97, 1, 1]


def test_too_few_values_or_an_unknown_column_are_refused():
    problem = problem_of(DataError, dataset(), "column", 4, column="ward")
    assert problem.code == "LF2053"
    assert problem.what == 'the column "ward" has 3 values; 4 sites need one each'
    problem = problem_of(TaskError, dataset(), "column", 2, column="wards")
    assert (problem.code, problem.key) == ("LF3110", "sites.partition.arguments.column")
    assert problem.remedy == 'did you mean "ward"?'


@pytest.mark.parametrize(
    ("name", "arguments", "needed"),
    [
        ("iid", {}, 20),
        ("dirichlet", {"alpha": 1.0}, 40),
        ("shards", {"per_site": 3}, 60),
        ("quantity", {"alpha": 1.0, "minimum": 4}, 80),
        ("column", {"column": "age"}, 20),
    ],
)
def test_too_few_rows_are_refused_with_the_number_needed(name, arguments, needed):
    problem = problem_of(DataError, dataset(19), name, 20, **arguments)
    assert problem.code == "LF2050"
    if needed > 20:
        problem = problem_of(DataError, dataset(needed - 1), name, 20, **arguments)
    assert f"{needed} in all" in problem.what


@pytest.mark.parametrize(("name", "arguments"), [("dirichlet", {"alpha": 1.0}), ("shards", {})])
def test_targets_are_needed_to_split_by_them(name, arguments):
    data = dataset(100, np.empty(0, np.int64))
    assert problem_of(DataError, data, name, 2, **arguments).code == "LF2051"
    assert len(split(data, "iid", 2)) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("dirichlet", {"alpha": 0}, "alpha"),
        ("dirichlet", {}, "alpha"),
        ("dirichlet", {"alpha": "one"}, "alpha"),
        ("quantity", {"alpha": 1, "minimum": 0}, "minimum"),
        ("shards", {"per_site": 0.5}, "per_site"),
        ("iid", {"alpha": 1}, "alpha"),
        ("iid", {"sites": 3}, "sites"),
    ],
)
def test_a_wrong_argument_is_named_by_its_key(name, arguments, key):
    spec = Partition(name, arguments)
    with pytest.raises(ConfError) as caught:
        partition(dataset(), CONTRACT, spec, 2, np.random.default_rng(0), key="p")
    assert caught.value.problems[0].key == f"p.arguments.{key}"


def test_no_site_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="0 sites"):
        split(dataset(), "iid", 0)


@pytest.mark.parametrize(
    "parts",
    [
        [np.arange(5)],
        [np.arange(10), np.arange(0)],
        [np.arange(5), np.arange(4, 10)],
        [np.arange(5), np.arange(6, 11)],
        [np.arange(5), ["five"]],
        None,
    ],
)
def test_a_foreign_partitioner_is_held_to_the_rule(monkeypatch, parts):
    monkeypatch.setattr(plugins, "load", lambda group, name, *, key="": lambda **given: parts)
    with pytest.raises(DataError) as caught:
        split(dataset(10), "mine", 2)
    assert caught.value.code == "LF2054"


def test_the_plugins_take_what_the_program_gives():
    given = ("dataset", "sites", "generator", "contract")
    for name in partitioners.__all__:
        if name not in ("partition", "split_held_out"):
            problems = plugins.check("partitioners", name, {}, given=given)
            assert {problem.code for problem in problems} <= {"LF1024"}


def test_held_out_rows_have_the_mixture_of_all():
    targets = np.repeat(np.arange(3), [800, 150, 50])
    rows = np.random.default_rng(0).permutation(5000)[:1000]
    train, held = split_held_out(rows, 0.2, np.random.default_rng(1), targets)
    of_row = dict(zip(rows, targets, strict=True))
    assert [sum(of_row[row] == each for row in held) for each in range(3)] == [160, 30, 10]
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.sort(rows))


def test_a_class_of_one_row_is_trained_on():
    targets = np.array([0, 0, 0, 0, 0, 0, 1, 2, 3, 4])
    for seed in range(30):
        _, held = split_held_out(np.arange(10), 0.4, np.random.default_rng(seed), targets)
        assert set(targets[held]) == {0}


def test_where_much_is_held_out_no_class_is_held_out_to_spare_another():
    targets = np.array([0, 0, 1, 2])
    for seed in range(10):
        train, _ = split_held_out(np.arange(4), 0.5, np.random.default_rng(seed), targets)
        assert sorted(targets[train]) in ([0, 1], [0, 2])


def test_which_rows_are_held_out_depends_on_the_generator():
    targets = np.zeros(100, np.int64)
    first, same, other = (
        split_held_out(np.arange(100), 0.3, np.random.default_rng(seed), targets)[1]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, np.nan])
def test_a_fraction_out_of_range_is_a_mistake_of_the_program(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split_held_out(np.arange(10), fraction, np.random.default_rng(0))


def test_targets_of_other_rows_are_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="10 rows, but 9 targets"):
        split_held_out(np.arange(10), 0.5, np.random.default_rng(0), np.zeros(9, np.int64))

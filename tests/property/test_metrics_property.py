from __future__ import annotations

import functools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lepton_fed.core.metrics import CountsSum, MetricsPlan

PLANS = {
    "two classes": MetricsPlan("classes", 2, ("accuracy", "precision", "recall", "auc")),
    "classes": MetricsPlan("classes", 4, ("accuracy", "macro_f1")),
    "number": MetricsPlan("number", 1, ("mae", "r2"), center=1.0, scale=3.0),
}


@st.composite
def sites(draw: st.DrawFn) -> tuple[MetricsPlan, list[np.ndarray[Any, Any]]]:
    """A plan and the counts of some sites, of none to thirty rows each."""
    plan = PLANS[draw(st.sampled_from(sorted(PLANS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = []
    for rows in draw(st.lists(st.integers(0, 30), min_size=1, max_size=6)):
        spread = 10.0 ** rng.integers(-3, 3)
        outputs = (rng.normal(size=(rows, plan.classes)) * spread).astype(np.float32)
        number = plan.kind == "number"
        targets = rng.normal(size=rows) if number else rng.integers(0, plan.classes, size=rows)
        counts.append(plan.measure(outputs, targets))
    return plan, counts


@given(sites(), st.randoms(use_true_random=False))
def test_the_order_of_sites_does_not_matter_to_the_bit(case: Any, random: Any) -> None:
    plan, counts = case
    shuffled = counts[:]
    random.shuffle(shuffled)
    totals = []
    for order in (counts, shuffled):
        total = CountsSum(plan.size)
        for each in order:
            total.add(each)
        totals.append(total.total())
    assert totals[0].tobytes() == totals[1].tobytes()
    assert plan.values(totals[0]) == plan.values(totals[1])


@given(sites())
def test_counts_that_were_measured_are_never_complained_about(case: Any) -> None:
    plan, counts = case
    assert [plan.complaint(each) for each in counts] == [""] * len(counts)
    assert plan.complaint(functools.reduce(np.add, counts)) == ""


@given(sites())
def test_metrics_lie_in_their_range(case: Any) -> None:
    plan, counts = case
    total = functools.reduce(np.add, counts)
    found = plan.values(total)
    assert bool(found) == (total[0] > 0)
    for name, value in found.items():
        assert np.isfinite(value)
        assert value <= 1 + 1e-12 or name in ("loss", "mae")
        assert value >= 0 or name == "r2"
    assert all(0 <= bound <= 0.5 for bound in plan.error_bounds(total).values())


@given(sites())
def test_the_ring_sum_of_counts_keeps_whole_numbers_exact(case: Any) -> None:
    plan, counts = case
    total = CountsSum(plan.size)
    for each in counts:
        total.add(each)
    exact = functools.reduce(np.add, counts)
    assert total.total()[0] == exact[0]
    if plan.kind == "classes":
        assert np.array_equal(total.total()[2:], exact[2:])
    assert np.abs(total.total() - exact).max() <= 1e-9

"""Metrics from counts against scikit-learn, which sees the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as oracle

from lepton_fed.core.metrics import (
    CLASS_METRICS,
    NUMBER_METRICS,
    SCORE_BINS,
    CountsSum,
    MetricsPlan,
    cross_entropy,
)
from lepton_fed.core.task import DataContract, Target, Task

Array = np.ndarray[Any, Any]


def classes_plan(classes: int) -> MetricsPlan:
    names = CLASS_METRICS if classes == 2 else CLASS_METRICS[:4]
    return MetricsPlan("classes", classes, names)


def rows_of(
    seed: int, classes: int, rows: int, present: list[int] | None = None
) -> tuple[Array, Array]:
    """Random logits and labels; labels come from ``present`` only."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(present if present is not None else range(classes), size=rows)
    logits = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[codes] * rng.random((rows, 1))
    return logits.astype(np.float32), codes.astype(np.int64)


CASES = [
    pytest.param(2, 200, None, id="two classes"),
    pytest.param(2, 50, [1], id="one of two classes occurs"),
    pytest.param(5, 400, None, id="five classes"),
    pytest.param(5, 60, [0, 3], id="three of five classes do not occur"),
    pytest.param(7, 4, None, id="fewer rows than classes"),
    pytest.param(3, 1, None, id="one row"),
]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "rows", "present"), CASES)
def test_class_metrics_are_those_of_scikit_learn(
    seed: int, classes: int, rows: int, present: list[int] | None
) -> None:
    logits, codes = rows_of(seed, classes, rows, present)
    plan = classes_plan(classes)
    found = plan.values(plan.measure(logits, codes))
    predicted = logits.argmax(axis=1)
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "loss": oracle.log_loss(codes, softmax(logits), labels=range(classes), normalize=True),
        "accuracy": oracle.accuracy_score(codes, predicted),
        "precision": oracle.precision_score(codes, predicted, **macro),
        "recall": oracle.recall_score(codes, predicted, **macro),
        "macro_f1": oracle.f1_score(codes, predicted, **macro),
    }
    found.pop("auc", None)
    assert found == pytest.approx(expected, abs=1e-9)
    assert list(found) == list(expected)


def test_a_class_that_is_predicted_but_never_occurs_counts_as_zero() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 2, 2]]
    codes = np.array([0, 0, 0])
    plan = classes_plan(3)
    found = plan.values(plan.measure(logits, codes))
    assert found["precision"] == pytest.approx(0.5)  # of classes 0 and 2; class 1 is not seen
    assert found["recall"] == pytest.approx(1 / 6)
    assert found["macro_f1"] == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
def test_auc_is_within_its_error_bound_of_the_exact_one(seed: int, sharpness: float) -> None:
    logits, codes = rows_of(seed, 2, 300)
    logits *= sharpness
    plan = MetricsPlan("classes", 2, ("auc",))
    counts = plan.measure(logits, codes)
    exact = oracle.roc_auc_score(codes, logits[:, 1].astype(np.float64) - logits[:, 0])
    bound = plan.error_bounds(counts)["auc"]
    assert abs(plan.values(counts)["auc"] - exact) <= bound + 1e-12
    assert bound < (0.01 if sharpness == 1.0 else 0.5)


def test_the_error_bound_of_auc_is_reached_when_all_scores_share_a_bin() -> None:
    plan = MetricsPlan("classes", 2, ("auc",))
    counts = plan.measure(np.array([[0, 0.0], [0, 1e-5]]), np.array([0, 1]))
    assert plan.values(counts)["auc"] == 0.5  # the truth is 1
    assert plan.error_bounds(counts) == {"auc": 0.5}


def test_auc_of_one_class_is_left_out() -> None:
    logits, _ = rows_of(1, 2, 10)
    plan = classes_plan(2)
    found = plan.values(plan.measure(logits, np.ones(10, dtype=np.int64)))
    assert "auc" not in found
    assert "accuracy" in found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_far_apart_overflow_nothing(dtype: Any) -> None:
    logits = np.array([[400, -400], [-400, 400], [1e30, -1e30], [0, 0]], dtype=dtype)
    plan = classes_plan(2)
    counts = plan.measure(logits, np.array([0, 1, 0, 1]))
    histogram = counts[6:].reshape(2, SCORE_BINS)
    assert histogram[0, 0] == 2
    assert histogram[1, SCORE_BINS - 1] == 1
    assert histogram[1, SCORE_BINS // 2] == 1
    assert plan.complaint(counts) == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, 400.0), (-3.0, 1e5)])
def test_number_metrics_are_those_of_scikit_learn(
    seed: int, low: float | None, high: float | None
) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(10, 300, size=50).astype(np.float32)
    outputs = (truth + rng.normal(size=50) * 20).astype(np.float32).reshape(-1, 1)
    contract = DataContract(target=Target("number", minimum=low, maximum=high))
    plan = MetricsPlan.of(Task(data=contract, metrics=list(NUMBER_METRICS)))
    found = plan.values(plan.measure(outputs, truth))
    expected = {
        "loss": oracle.mean_squared_error(truth, outputs),
        "mae": oracle.mean_absolute_error(truth, outputs),
        "r2": oracle.r2_score(truth, outputs),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == ["loss", "mae", "r2"]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("rows", [1, 7])
def test_r2_of_targets_that_are_all_the_same_is_left_out(value: float, rows: int) -> None:
    plan = MetricsPlan("number", 1, NUMBER_METRICS)
    found = plan.values(plan.measure(np.full(rows, value + 1), np.full(rows, value)))
    assert found == pytest.approx({"loss": 1.0, "mae": 1.0})


@pytest.mark.parametrize("plan", [classes_plan(2), classes_plan(6)], ids=["two", "six"])
def test_two_sites_combined_are_the_pooled_rows(plan: MetricsPlan) -> None:
    """Unequal sites, the smaller without most classes: averages of their ratios would differ."""
    one = rows_of(1, plan.classes, 500)
    two = rows_of(2, plan.classes, 37, present=[1])
    pooled = plan.measure(*(np.concatenate(parts) for parts in zip(one, two, strict=True)))
    combined = plan.values(plan.measure(*one) + plan.measure(*two))
    assert combined == pytest.approx(plan.values(pooled), abs=1e-9)
    averaged = [plan.values(plan.measure(*site))["macro_f1"] for site in (one, two)]
    assert combined["macro_f1"] != pytest.approx(np.mean(averaged), abs=1e-2)


def test_two_sites_combined_are_the_pooled_rows_for_numbers_too() -> None:
    plan = MetricsPlan("number", 1, NUMBER_METRICS, center=50, scale=50)
    rng = np.random.default_rng(3)
    sites = [(rng.normal(size=n) * 9 + 40, rng.normal(size=n) * 9 + 60) for n in (400, 11)]
    pooled = plan.measure(*(np.concatenate(parts) for parts in zip(*sites, strict=True)))
    combined = plan.values(sum(plan.measure(*site) for site in sites))
    assert combined == pytest.approx(plan.values(pooled), abs=1e-9)


def test_the_ring_sum_of_counts_is_exact_for_counts_and_close_for_losses() -> None:
    plan = classes_plan(2)
    counts = [plan.measure(*rows_of(seed, 2, 50 + seed)) for seed in range(4)]
    total = CountsSum(plan.size)
    for each in counts:
        total.add(each)
    exact = sum(counts)
    assert np.array_equal(np.delete(total.total(), 1), np.delete(exact, 1))
    assert total.total()[1] == pytest.approx(exact[1], rel=1e-15)


def test_no_rows_have_no_metrics() -> None:
    for plan in (classes_plan(2), classes_plan(4), MetricsPlan("number", 1, NUMBER_METRICS)):
        nothing = np.zeros(plan.size)
        assert plan.values(nothing) == {}
        assert plan.error_bounds(nothing) == {}
        assert plan.complaint(nothing) == ""
    empty = classes_plan(2).measure(np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    assert not empty.any()


def test_only_the_metrics_of_the_task_are_shown_in_its_order() -> None:
    target = Target(classes=["a", "b"])
    task = Task(data=DataContract(target=target), metrics=["recall", "accuracy"])
    plan = MetricsPlan.of(task)
    counts = plan.measure(*rows_of(0, 2, 20))
    assert plan.size == len(counts) == 6
    assert list(plan.values(counts)) == ["loss", "recall", "accuracy"]
    assert plan.error_bounds(counts) == {}


def honest(kind: str) -> tuple[MetricsPlan, Array]:
    if kind == "number":
        plan = MetricsPlan("number", 1, NUMBER_METRICS)
        return plan, plan.measure(np.array([1.0, 2.5]), np.array([0.0, 3.0]))
    plan = classes_plan(2 if kind == "auc" else 3)
    return plan, plan.measure(*rows_of(0, plan.classes, 30))


@pytest.mark.parametrize("kind", ["auc", "classes", "number"])
def test_honest_counts_are_not_complained_about(kind: str) -> None:
    plan, counts = honest(kind)
    assert plan.complaint(counts) == ""
    assert plan.complaint(counts + counts) == ""


@pytest.mark.parametrize("kind", ["auc", "classes", "number"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e301])
def test_counts_that_are_not_finite_or_too_large_are_refused(kind: str, value: float) -> None:
    plan, counts = honest(kind)
    for place in range(0, len(counts), 97):
        changed = counts.copy()
        changed[place] = value
        assert plan.complaint(changed)


@pytest.mark.parametrize("kind", ["auc", "classes", "number"])
def test_counts_of_another_shape_or_type_are_refused(kind: str) -> None:
    plan, counts = honest(kind)
    for changed in (counts[:-1], np.append(counts, 0), counts[:, None], counts.astype(np.float32)):
        assert "not float64" in plan.complaint(changed)


@pytest.mark.parametrize("kind", ["auc", "classes"])
def test_any_single_count_that_is_changed_is_found(kind: str) -> None:
    plan, counts = honest(kind)
    for place in [0, *range(2, len(counts), 7 if kind == "auc" else 1)]:
        for change in (1, -1, 0.5, 1000):
            changed = counts.copy()
            changed[place] += change
            assert plan.complaint(changed), (place, change)


def test_counts_moved_below_zero_are_refused_though_they_add_up() -> None:
    plan, counts = honest("classes")
    counts[2] -= 100
    counts[3] += 100
    assert "negative" in plan.complaint(counts)


def test_scores_moved_to_the_other_class_are_refused_though_they_add_up() -> None:
    plan, counts = honest("auc")
    place = 6 + int(np.flatnonzero(counts[6 : 6 + SCORE_BINS])[0])
    counts[place] -= 1
    counts[place + SCORE_BINS] += 1
    assert "scores" in plan.complaint(counts)


@pytest.mark.parametrize(("place", "value"), [(0, -1.0), (0, 1.5), (1, -0.1), (2, -0.1), (4, -0.1)])
def test_sums_of_numbers_that_no_rows_have_are_refused(place: int, value: float) -> None:
    plan, counts = honest("number")
    counts[place] = value
    assert plan.complaint(counts)


@pytest.mark.parametrize("kind", ["auc", "classes", "number"])
def test_sums_without_rows_are_refused(kind: str) -> None:
    plan, counts = honest(kind)
    changed = np.zeros_like(counts)
    changed[1] = 5.0
    assert "no rows" in plan.complaint(changed)


def test_cross_entropy_is_that_of_scikit_learn_and_does_not_overflow() -> None:
    logits, codes = rows_of(4, 4, 64)
    expected = oracle.log_loss(codes, softmax(logits), labels=range(4))
    assert cross_entropy(logits, codes).mean() == pytest.approx(expected, abs=1e-9)
    far = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    assert cross_entropy(far, np.array([0, 0])).tolist() == [0.0, 1e4]


def softmax(logits: Array) -> Array:
    wide = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(wide / wide.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("width", [1e-3, 1.0, 1e4, 1e8, 1e12])
def test_metrics_of_numbers_are_those_of_the_pooled_rows_whatever_the_range(width: float) -> None:
    rng = np.random.default_rng(4)
    task = Task(
        data=DataContract(target=Target("number", "y", minimum=0.0, maximum=width)),
        metrics=["mae", "r2"],
    )
    plan = MetricsPlan.of(task)
    targets = [rng.normal(width / 2e3, width / 1e5, size=n) for n in (30, 50, 41)]
    outputs = [target + rng.normal(0, width / 1e6, size=len(target)) for target in targets]
    total = CountsSum(plan.size)
    for output, target in zip(outputs, targets, strict=True):
        total.add(plan.measure(output, target))
    truth, found = np.concatenate(targets), np.concatenate(outputs)
    values = plan.values(total.total())
    spread = ((truth - truth.mean()) ** 2).sum()
    assert values["loss"] == pytest.approx(((found - truth) ** 2).mean(), rel=1e-6)
    assert values["mae"] == pytest.approx(np.abs(found - truth).mean(), rel=1e-6)
    exact = 1 - ((found - truth) ** 2).sum() / spread
    bound = plan.error_bounds(total.total()).get("r2", 1e-6)
    assert abs(values["r2"] - exact) <= bound


def test_outputs_that_are_not_finite_are_counted_and_then_refused() -> None:
    plan = classes_plan(2)
    assert "auc" in plan.names
    with np.errstate(invalid="ignore"):
        counts = plan.measure(np.full((3, 2), np.nan), np.array([0, 1, 1]))
    assert plan.complaint(counts) == "counts are not finite"

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.exchange import Reply, Update
from lepton_fed.core.layout import Layout
from lepton_fed.core.task import Aggregation
from lepton_fed.errors import UpdateRefused
from lepton_fed.server.admission import admit, admit_claims

SIZE = 40_000  # more than one slice of the norm
LAYOUT = Layout.of([("weight", "shared", np.zeros(SIZE, np.float32))])
BOUNDS = Aggregation("rows", weight_bound=200.0, norm_bound=10.0)
EQUAL = Aggregation(norm_bound=10.0)


def vector(**at: float) -> np.ndarray[Any, Any]:
    """A vector of zeros but for the given places."""
    values = np.zeros(SIZE, dtype=np.float32)
    for place, value in at.items():
        values[int(place[1:])] = value
    return values


GOOD = Update(LAYOUT.digest, {"delta": vector(_0=3.0, _39999=4.0)}, 1.0)


def refusal(update: Update, vectors: tuple[str, ...] = ("delta",)) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UpdateRefused) as caught:
            admit(update, LAYOUT, BOUNDS, vectors, "site-7")
    (problem,) = caught.value.problems
    assert problem.where == "site-7"
    assert problem.remedy
    return problem.code, problem.what


def test_a_good_update_is_admitted_and_its_norm_told() -> None:
    assert admit(GOOD, LAYOUT, BOUNDS, ("delta",), "a") == 5.0


def test_the_largest_norm_of_several_vectors_is_told() -> None:
    update = replace(GOOD, vectors={"delta": vector(_1=1.0), "control": vector(_2=-7.0)})
    assert admit(update, LAYOUT, BOUNDS, ("delta", "control"), "a") == 7.0


def test_the_norm_is_that_of_a_sum_in_twice_the_precision() -> None:
    values = 1e-2 * np.random.default_rng(5).standard_normal(SIZE, dtype=np.float32)
    told = admit(Update(LAYOUT.digest, {"delta": values}, 1.0), LAYOUT, BOUNDS, ("delta",), "a")
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in values))
    assert told == pytest.approx(exact, rel=1e-14)


def test_values_at_the_bounds_are_admitted() -> None:
    update = Update(LAYOUT.digest, {"delta": vector(_5=10.0)}, 200.0)
    assert admit(update, LAYOUT, BOUNDS, ("delta",), "a") == 10.0
    assert admit(replace(update, weight=1.0), LAYOUT, BOUNDS, ("delta",), "a") == 10.0


@pytest.mark.parametrize("digest", ["", "0" * 64, LAYOUT.digest.upper(), LAYOUT.digest + " "])
def test_an_update_of_another_layout_is_refused(digest: str) -> None:
    assert refusal(replace(GOOD, layout=digest))[0] == "LF4401"


@pytest.mark.parametrize(
    "names", [(), ("Delta",), ("delta", "extra"), ("other",)], ids=lambda names: ",".join(names)
)
def test_missing_and_extra_vectors_are_refused(names: tuple[str, ...]) -> None:
    code, what = refusal(replace(GOOD, vectors={name: vector() for name in names}))
    assert code == "LF4402"
    assert "wanted ['delta']" in what


def test_a_vector_the_strategy_wants_beside_the_delta_must_be_there() -> None:
    assert refusal(GOOD, ("delta", "control"))[0] == "LF4402"


@pytest.mark.parametrize(
    "weight",
    [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 201.0, 1e300, 0.5, 1.5, 1e-12],
)
def test_a_weight_out_of_bounds_is_refused(weight: float) -> None:
    code, what = refusal(replace(GOOD, weight=weight))
    assert code == "LF4403"
    assert what.endswith("is no number of rows from 1 to 200")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0000001, 2.0, 1e-12, 1000.0, math.nan, -1.0])
def test_where_sites_count_equally_only_weight_one_is_admitted(weight: float) -> None:
    for bound in (1.0, 1000.0):
        with pytest.raises(UpdateRefused) as caught:
            admit(replace(GOOD, weight=weight), LAYOUT, replace(EQUAL, weight_bound=bound),
                  ("delta",), "a")  # fmt: skip
        assert caught.value.code == "LF4403"
    assert admit(GOOD, LAYOUT, EQUAL, ("delta",), "a") == 5.0


@pytest.mark.parametrize(
    "weight", [True, "1", None, 1, 10**400, [1.0], np.ones(1), 1j], ids=lambda w: type(w).__name__
)
def test_a_weight_that_is_no_float_is_refused(weight: Any) -> None:
    code, what = refusal(replace(GOOD, weight=weight))
    assert code == "LF4403"
    assert what == f"a weight of type {type(weight).__name__}"


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(SIZE, np.float64),
        np.zeros(SIZE, np.float16),
        np.zeros(SIZE, np.int32),
        np.zeros(SIZE, ">f4"),
        np.zeros(SIZE, bool),
        np.zeros(SIZE, object),
        [0.0] * SIZE,
        None,
    ],
    ids=lambda v: str(getattr(v, "dtype", type(v).__name__)),
)
def test_a_vector_of_another_element_type_is_refused(values: Any) -> None:
    assert refusal(replace(GOOD, vectors={"delta": values})) == (
        "LF4404",
        "vector 'delta' is not float32",
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (SIZE - 1,), (SIZE + 1,), (SIZE, 1), (1, SIZE)])
def test_nothing_is_broadcast(shape: tuple[int, ...]) -> None:
    code, what = refusal(replace(GOOD, vectors={"delta": np.zeros(shape, np.float32)}))
    assert code == "LF4404"
    assert f"not ({SIZE},)" in what


@pytest.mark.parametrize("place", ["_0", "_20000", "_39999"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FA00000, 0x7F800000, 0xFF800000], ids=hex)
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(place: str, bits: int) -> None:
    """A quiet and a signalling NaN, and both infinities; none of them is worth a warning."""
    values = vector()
    values.view(np.uint32)[int(place[1:])] = bits
    code, what = refusal(replace(GOOD, vectors={"delta": values}))
    assert (code, what) == ("LF4405", "vector 'delta' holds NaN or infinities")


def test_the_second_vector_is_looked_at_too() -> None:
    update = replace(GOOD, vectors={"delta": vector(), "control": vector(_9=math.nan)})
    assert refusal(update, ("delta", "control")) == (
        "LF4405",
        "vector 'control' holds NaN or infinities",
    )


@pytest.mark.parametrize("value", [10.000001, -11.0, 3.4e38])
def test_a_norm_beyond_the_bound_is_refused(value: float) -> None:
    code, what = refusal(replace(GOOD, vectors={"delta": vector(_3=value)}))
    assert code == "LF4406"
    assert what.endswith("exceeds 10")


def test_many_small_values_add_up_to_a_norm_beyond_the_bound() -> None:
    values = np.full(SIZE, 0.0501, dtype=np.float32)  # sqrt(40000) * 0.0501 = 10.02
    assert refusal(replace(GOOD, vectors={"delta": values}))[0] == "LF4406"


def test_what_a_stranger_wrote_is_quoted_short_and_without_control_characters() -> None:
    _, what = refusal(replace(GOOD, layout="\x1b[2J\x07" + "x" * 10_000))
    assert what.startswith("layout ?[2J?xxxxxxx is not")
    _, what = refusal(replace(GOOD, vectors={"\x1b[2J": vector(), "y" * 10_000: vector()}))
    assert len(what) < 150
    assert what.isprintable()


DP = RecordPrivacy(enabled=True, epsilon=8.0)


@pytest.mark.parametrize("claim", [0.0, 0.5, 8.0, None])
def test_a_claim_of_privacy_that_can_be_true_is_taken(claim: float | None) -> None:
    admit_claims(Reply("a", epsilon=claim, noise_multiplier=claim), DP)


@pytest.mark.parametrize("name", ["epsilon", "noise_multiplier"])
@pytest.mark.parametrize("claim", [math.nan, math.inf, -math.inf, -1e-9, 1e308, 1e25])
def test_a_claim_of_privacy_that_cannot_be_true_is_refused(name: str, claim: float) -> None:
    with pytest.raises(UpdateRefused) as caught:
        admit_claims(Reply("a", **{name: claim}), DP)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF4412", "a")
    assert problem.what.startswith(name.replace("_", " "))


def test_an_epsilon_beyond_the_target_of_the_run_is_refused() -> None:
    with pytest.raises(UpdateRefused):
        admit_claims(Reply("a", epsilon=8.001), DP)


@pytest.mark.parametrize("name", ["epsilon", "noise_multiplier"])
def test_a_claim_of_privacy_in_a_run_without_dp_is_refused(name: str) -> None:
    with pytest.raises(UpdateRefused) as caught:
        admit_claims(Reply("a", **{name: 1.0}), RecordPrivacy())
    assert "without DP" in caught.value.problems[0].what

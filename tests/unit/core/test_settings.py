from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

import pytest

from lepton_fed.core.settings import Setting, setting, setting_of


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "complaint"),
    [
        (Setting("", above=0), [1e-9, 1, 1e300], [0, -1], "greater than 0"),
        (Setting("", at_least=1), [1, 2.5], [0.999, -7], "at least 1"),
        (Setting("", below=1), [0.5, -3], [1, 1.5], "smaller than 1"),
        (Setting("", at_most=2.5), [2.5, 2], [2.500001, 9], "at most 2.5"),
    ],
)
def test_each_bound_is_held_on_both_sides(
    bounds: Setting, good: list[float], bad: list[float], complaint: str
) -> None:
    assert [bounds.complaint(value) for value in good] == [""] * len(good)
    assert all(complaint in bounds.complaint(value) for value in bad)


def test_both_ends_of_a_range_are_held() -> None:
    bounds = Setting("", above=0, at_most=1)
    assert not bounds.complaint(1)
    assert "greater than 0" in bounds.complaint(0)
    assert "at most 1" in bounds.complaint(1.1)


@pytest.mark.parametrize("bounds", [Setting(""), Setting("", above=0), Setting("", below=1)])
def test_nan_is_refused_whatever_the_bounds(bounds: Setting) -> None:
    assert "NaN" in bounds.complaint(float("nan"))


@pytest.mark.parametrize("value", ["text", None, [0], True, False])
def test_bounds_are_for_numbers_only(value: object) -> None:
    assert Setting("", above=5).complaint(value) == ""


def test_infinity_is_beyond_an_upper_bound() -> None:
    assert Setting("", at_most=1e300).complaint(float("inf"))
    assert Setting("", below=float("inf")).complaint(float("inf"))


@dataclass(frozen=True)
class Sample:
    required: int = setting(doc="Must be given.")
    rate: float = setting(0.5, "A rate.", above=0, unit="1/s", advanced=True)
    names: list[str] = setting(factory=list, doc="Names.")
    plain: int = field(default=3)


def test_a_declared_field_carries_its_meaning_and_its_default() -> None:
    required, rate, names, plain = fields(Sample)
    assert required.default is MISSING
    assert setting_of(required).doc == "Must be given."
    assert rate.default == 0.5
    assert setting_of(rate) == Setting("A rate.", above=0, unit="1/s", advanced=True)
    assert setting_of(names).doc == "Names."
    assert setting_of(plain) == Setting("")


def test_a_factory_makes_a_new_default_each_time() -> None:
    assert Sample(1).names is not Sample(1).names

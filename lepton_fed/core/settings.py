"""A dataclass field that is also a documented conf key: meaning, bounds and unit in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from dataclasses import Field as DataclassField
from typing import Any

__all__ = ["Setting", "setting", "setting_of"]

_KEY = "lepton"


@dataclass(frozen=True)
class Setting:
    """What a conf key means and which values it takes.

    Args:
        doc: Meaning, in one or two plain sentences.
        above: Value must be greater than this.
        at_least: Value must not be smaller than this.
        below: Value must be smaller than this.
        at_most: Value must not be greater than this.
        unit: Unit of a number, for example ``s`` or ``bytes``.
        advanced: Leave the key out of a freshly written conf file while it has its default.
    """

    doc: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    unit: str = ""
    advanced: bool = False

    def complaint(self, value: object) -> str:
        """Return what is out of range about ``value``, or an empty string."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        if value != value:  # NaN compares false with every bound
            return "must be a number, not NaN"
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above:g}"
        if self.at_least is not None and not value >= self.at_least:
            return f"must be at least {self.at_least:g}"
        if self.below is not None and not value < self.below:
            return f"must be smaller than {self.below:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"must be at most {self.at_most:g}"
        return ""


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    advanced: bool = False,
) -> Any:
    """Declare a dataclass field together with its :class:`Setting`.

    Args:
        default: Default value; a field without one is required.
        doc: Meaning of the key, shown by ``lepton-fed config explain`` and in conf files.
        factory: Makes the default, for mutable ones.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        unit: Unit of a number.
        advanced: Leave out of a freshly written conf file while it has its default.

    Returns:
        A dataclass field.
    """
    info = Setting(doc, above, at_least, below, at_most, unit, advanced)
    metadata = {_KEY: info}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def setting_of(of: DataclassField[Any]) -> Setting:
    """Return the :class:`Setting` of a dataclass field (an empty one if it has none)."""
    found = of.metadata.get(_KEY)
    return found if isinstance(found, Setting) else Setting(doc="")

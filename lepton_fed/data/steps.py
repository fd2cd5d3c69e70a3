"""Arguments that a conf gives to a step: read by name and type, all problems noted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lepton_fed.core.settings import Setting
from lepton_fed.data.findings import nearest
from lepton_fed.errors import Problem, quoted

__all__ = ["Arguments"]


class Arguments:
    """The arguments of one step, and a list of what is wrong with them.

    Each argument is asked for once by name; :meth:`close` then complains about those nobody asked
    for. A wrong one is noted and answered by a stand-in, so that the other steps are still looked
    at; nothing built with a stand-in is ever used.

    Args:
        values: What the conf gives.
        key: Conf key of the arguments.
        problems: Takes what is wrong.
    """

    def __init__(self, values: Mapping[str, object], key: str, problems: list[Problem]) -> None:
        self._values = values
        self._key = key
        self._problems = problems
        self._asked: list[str] = []

    def has(self, name: str) -> bool:
        """Return whether the conf gives ``name``."""
        return name in self._values

    def number(self, name: str, bounds: Setting, default: float | None = None) -> float:
        """Return a number that float32 can hold.

        Args:
            name: Name of the argument.
            bounds: What it means and which values it takes.
            default: Its value where the conf gives none; without one it is required.
        """
        value = self._given(name, default)
        return 1.0 if value is None else self._checked(name, value, bounds)

    def whole(self, name: str, bounds: Setting, default: int | None = None) -> int:
        """Return a whole number; arguments as :meth:`number`."""
        value = self._given(name, default)
        if value is None:
            return 1
        if not isinstance(value, int):
            self._wrong(name, f"{quoted(value)} is not a whole number")
            return 1
        return int(self._checked(name, value, bounds))

    def numbers(self, name: str, count: int, bounds: Setting) -> list[float]:
        """Return a list of ``count`` numbers; other arguments as :meth:`number`."""
        value = self._given(name, None)
        if value is None:
            return [1.0] * count
        if not isinstance(value, (list, tuple)):
            self._wrong(name, f"{quoted(value)} is not a list of {count} numbers")
            return [1.0] * count
        if len(value) != count:
            self._wrong(name, f"the list has {len(value)} numbers, {count} are needed")
            return [1.0] * count
        return [self._checked(name, each, bounds) for each in value]

    def refuse(self, code: str, what: str, *, name: str = "", remedy: str = "") -> None:
        """Note a problem of the caller's own.

        Args:
            code: Error code.
            what: What is wrong.
            name: The argument to blame, if it is one.
            remedy: What to do.
        """
        key = f"{self._key}.{name}" if name else self._key
        self._problems.append(Problem(code, what, key=key, remedy=remedy))

    def close(self) -> None:
        """Note the arguments that nobody asked for."""
        for name in self._values:
            if name not in self._asked:
                self.refuse(
                    "LF3102",
                    f"there is no argument {quoted(name)} here",
                    name=name,
                    remedy=nearest(name, self._asked),
                )

    def _given(self, name: str, default: object) -> object:
        self._asked.append(name)
        value = self._values.get(name, default)
        if value is None:
            self.refuse("LF3103", f"the argument `{name}` is missing", name=name)
        return value

    def _checked(self, name: str, value: object, bounds: Setting) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(name, f"{quoted(value)} is not a number")
            return 1.0
        with np.errstate(over="ignore", under="ignore"):
            try:
                single = float(np.float32(value))
            except OverflowError:  # a whole number beyond float64
                single = math.inf
        if not math.isfinite(single) or (single == 0) != (value == 0):
            self._wrong(name, f"{quoted(value)} does not fit float32")
            return 1.0
        complaint = bounds.complaint(value)
        if complaint:
            self._wrong(name, f"{value} {complaint}")
            return 1.0
        return float(value)

    def _wrong(self, name: str, what: str) -> None:
        self.refuse("LF3104", what, name=name)

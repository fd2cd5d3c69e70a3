"""Everything that a conf names, found through entry points.

A package that declares an entry point in one of the four groups adds a strategy, model, reader or
partitioner; nothing else can be named, so no conf and no task brings code along. A plug-in is a
callable, and its signature is the documentation of its arguments: what a user writes in the conf is
bound to it, name by name and type by type, before anything runs.

Bounds of an argument are checked where it declares them: ``Annotated[float, Setting("", above=0)]``
for a function, a field made with ``setting(...)`` for a dataclass.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lepton_fed.config.hints import advice, bounds, fit, shown, words
from lepton_fed.config.nearest import did_you_mean, nearest
from lepton_fed.core.settings import Setting, setting_of
from lepton_fed.errors import ConfError, LeptonError, Problem

__all__ = ["Argument", "Group", "arguments_of", "call", "check", "load", "names", "unknown"]

Group = Literal["strategies", "models", "readers", "partitioners"]

_SINGULAR: dict[Group, str] = {
    "strategies": "strategy",
    "models": "model",
    "readers": "reader",
    "partitioners": "partitioner",
}
# What importing somebody else's module is known to raise.
_IMPORT_FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_ANYTHING = inspect.Parameter.VAR_KEYWORD
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Argument:
    """An argument of a plug-in that a user may set.

    Args:
        name: Its name.
        hint: Its type hint; ``Any`` when the plug-in gives none that resolves.
        default: Its default, ``inspect.Parameter.empty`` when it must be given.
        setting: Its bounds, when it declares them.
        doc: What the plug-in's docstring says about it; may be empty.
    """

    name: str
    hint: Any
    default: Any
    setting: Setting
    doc: str = ""

    @property
    def required(self) -> bool:
        """Return whether the argument must be given."""
        return self.default is inspect.Parameter.empty


def names(group: Group) -> list[str]:
    """Return the names of the installed plug-ins of a group, sorted; imports none of them."""
    return sorted({point.name for point in _points(group)})


def unknown(group: Group, name: str, *, key: str = "") -> Problem | None:
    """Return a problem if no installed plug-in has the name; imports none.

    Args:
        group: The group.
        name: The name.
        key: Dotted key at which the conf says it.
    """
    installed = names(group)
    if name in installed:
        return None
    remedy = did_you_mean(name, installed, noun=f"installed {group}")
    return Problem("LF1021", f"no {_SINGULAR[group]} {name!r} is installed", key=key, remedy=remedy)


def load(group: Group, name: str, *, key: str = "") -> Callable[..., Any]:
    """Import a plug-in.

    Args:
        group: The group.
        name: Its name.
        key: Dotted key at which the conf names it, for messages.

    Raises:
        ConfError: It is not installed, two packages claim the name, or it cannot be imported.
    """
    if (problem := unknown(group, name, key=key)) is not None:
        raise ConfError(problem)
    points = [point for point in _points(group) if point.name == name]
    what = f"{_SINGULAR[group]} {name!r}"
    if len({point.value for point in points}) > 1:
        packages = ", ".join(sorted(_package(point) for point in points))
        raise ConfError(
            Problem(
                "LF1022",
                f"more than one package brings a {what}: {packages}",
                key=key,
                remedy="uninstall all but one of them",
            )
        )
    point = points[0]
    try:
        plugin = point.load()
    except _IMPORT_FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfError(_broken(point, what, f"cannot be imported: {reason}", key)) from error
    if not callable(plugin):
        raise ConfError(_broken(point, what, f"is no callable ({point.value})", key))
    return plugin  # type: ignore[no-any-return]


def check(
    group: Group,
    name: str,
    arguments: Mapping[str, object],
    *,
    given: Collection[str] = (),
    key: str = "",
) -> list[Problem]:
    """Return what is wrong with a plug-in's name and arguments; imports it, does not call it.

    Args:
        group: The group.
        name: Name of the plug-in.
        arguments: What the user set.
        given: Names of the arguments that the program sets itself.
        key: Dotted key of the arguments; a problem with one is at ``<key>.<argument>``.
    """
    try:
        plugin = load(group, name, key=key)
        _, problems = _bind(plugin, f"{_SINGULAR[group]} {name!r}", arguments, given, key)
    except LeptonError as error:
        return list(error.problems)
    return problems


def call(
    group: Group,
    name: str,
    arguments: Mapping[str, object],
    /,
    *given: object,
    key: str = "",
    **given_by_name: object,
) -> Any:
    """Call a plug-in with a user's arguments and the program's own.

    Args:
        group: The group.
        name: Name of the plug-in.
        arguments: What the user set.
        *given: The program's leading arguments.
        key: Dotted key of the user's arguments; a problem with one is at ``<key>.<argument>``.
        **given_by_name: The program's other arguments.

    Returns:
        What the plug-in returns.

    Raises:
        ConfError: The plug-in cannot be loaded, or arguments do not fit its signature (all of them
            are named). What the plug-in itself raises is passed on.
    """
    plugin = load(group, name, key=key)
    what = f"{_SINGULAR[group]} {name!r}"
    leading = list(_signature(plugin, what, key))[: len(given)]
    bound, problems = _bind(plugin, what, arguments, [*leading, *given_by_name], key)
    if problems:
        raise ConfError(problems)
    return plugin(*given, **given_by_name, **bound)


def arguments_of(
    group: Group, name: str, *, given: Collection[str] = (), key: str = ""
) -> list[Argument]:
    """Return the arguments of a plug-in that a user may set, in the order of its signature.

    Args:
        group: The group.
        name: Name of the plug-in.
        given: Names of the arguments that the program sets itself.
        key: Dotted key of the arguments, for messages.

    Raises:
        ConfError: The plug-in cannot be loaded or tells no signature.
    """
    plugin = load(group, name, key=key)
    signature = _signature(plugin, f"{_SINGULAR[group]} {name!r}", key)
    return [a for a in _arguments(plugin, signature) if a.name not in given]


def _points(group: Group) -> Sequence[EntryPoint]:
    return tuple(entry_points(group=f"lepton_fed.{group}"))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _broken(point: EntryPoint, what: str, why: str, key: str) -> Problem:
    package = _package(point)
    return Problem(
        "LF1022",
        f"{what} of package {package} {why}",
        key=key,
        remedy=f"repair or update {package}",
    )


def _bind(
    plugin: Callable[..., Any],
    what: str,
    arguments: Mapping[str, object],
    given: Collection[str],
    key: str,
) -> tuple[dict[str, object], list[Problem]]:
    signature = _signature(plugin, what, key)
    takes_anything = any(p.kind is _ANYTHING for p in signature.values())
    problems = [
        Problem(
            "LF1022",
            f"{what} does not take the argument `{name}` that it is given",
            key=key,
            remedy="its author must add it to the signature",
        )
        for name in given
        if name not in signature and not takes_anything
    ]
    known = {a.name: a for a in _arguments(plugin, signature) if a.name not in given}
    bound: dict[str, object] = {}
    for name, value in arguments.items():
        place = f"{key}.{name}" if key else name
        if name in given:
            problems.append(
                Problem(
                    "LF1026",
                    f"`{name}` is set by the program, not by a conf",
                    key=place,
                    remedy="leave it out",
                )
            )
        elif name in known:
            bound[name], found = _fitted(value, known[name], place)
            problems += found
        elif takes_anything:
            bound[name] = value
        else:
            remedy = did_you_mean(name, known, noun="its arguments")
            problems.append(
                Problem("LF1023", f"{what} has no argument `{name}`", key=place, remedy=remedy)
            )
    misspelt = {nearest(name, known) for name in arguments if name not in known}
    problems += (
        Problem(
            "LF1024",
            f"{what} needs the argument `{a.name}`",
            key=f"{key}.{a.name}" if key else a.name,
            remedy=f"give it: {words(a.hint)}",
        )
        for a in known.values()
        if a.required and a.name not in arguments and a.name not in misspelt
    )
    return bound, problems


def _fitted(value: object, argument: Argument, key: str) -> tuple[object, list[Problem]]:
    fitting, fits = fit(value, argument.hint)
    if not fits:
        what = f"wants {words(argument.hint)}, not {shown(value)}"
        return value, [Problem("LF1025", what, key=key, remedy=advice(argument.hint))]
    if argument.setting.complaint(fitting):
        what, remedy = f"{shown(value)} is out of range", f"it must be {bounds(argument.setting)}"
        return value, [Problem("LF1025", what, key=key, remedy=remedy)]
    return fitting, []


def _signature(plugin: Callable[..., Any], what: str, key: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(plugin).parameters
    except (TypeError, ValueError) as error:
        problem = Problem("LF1022", f"{what} tells no signature: {error}", key=key)
        raise ConfError(problem) from error


def _arguments(
    plugin: Callable[..., Any], signature: Mapping[str, inspect.Parameter]
) -> Iterator[Argument]:
    declared = {}
    if is_dataclass(plugin):
        declared = {field.name: setting_of(field) for field in fields(plugin)}
    docs = _documented(inspect.getdoc(plugin) or "")
    for parameter in signature.values():
        if parameter.kind in _NAMED:
            name = parameter.name
            hint, setting = _hint(plugin, parameter.annotation)
            setting = declared.get(name, setting)
            doc = docs.get(name, setting.doc)
            yield Argument(name, hint, parameter.default, setting, doc)


def _documented(docstring: str) -> dict[str, str]:
    """Return the descriptions of arguments in a Google-style docstring, by name."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.findall(
        r"^ {4}(\w+).*?:[ ](.*(?:\n {5,}.*)*)", section[1] if section else "", re.M
    )
    return {name: " ".join(text.split()) for name, text in entries}


def _hint(plugin: Callable[..., Any], annotation: object) -> tuple[Any, Setting]:
    """Return a resolved annotation and the setting it carries.

    Each is resolved by itself: one that names a type which is imported for type checkers only must
    not take the others along. What does not resolve fits everything.
    """
    if annotation is inspect.Parameter.empty:
        return Any, Setting("")
    module = sys.modules.get(getattr(plugin, "__module__", ""))
    holder = SimpleNamespace(__annotations__={"it": annotation})
    try:
        hint = get_type_hints(holder, vars(module) if module else {}, include_extras=True)["it"]
    except (AttributeError, NameError, SyntaxError, TypeError):
        return Any, Setting("")
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return hint, next((extra for extra in extras if isinstance(extra, Setting)), Setting(""))

"""Loading a conf: a file and overrides in, a typed conf out, or every problem at once.

The file is read into a document with places (:mod:`.document`), overrides are put in
(:mod:`.overrides`), every key is converted along the dataclass schema (:mod:`.convert`), OmegaConf
builds the conf, and the rules look for contradictions (:mod:`.rules`). Nothing of this imports a
plug-in or a framework.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from omegaconf import OmegaConf

from lepton_fed.config import yaml_text
from lepton_fed.config.convert import Converter
from lepton_fed.config.document import Node, from_plain, parse
from lepton_fed.config.files import read_text
from lepton_fed.config.hints import shown
from lepton_fed.config.keys import split
from lepton_fed.config.nearest import nearest
from lepton_fed.config.overrides import COMMAND_LINE, apply
from lepton_fed.config.rules import problems_of
from lepton_fed.config.schema import KINDS
from lepton_fed.core.digests import plain
from lepton_fed.core.task import Task
from lepton_fed.errors import ConfError, Problem, capped

__all__ = ["Loaded", "in_order", "kind_of", "load_conf", "load_task", "load_values"]

T = TypeVar("T")

_PLACE = re.compile(r":([0-9]+):([0-9]+)$")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A conf and where each of its values was written.

    Args:
        conf: The conf.
        source: Name of its file, or ``template``.
        places: Place of every key that was given, by dotted key.
    """

    conf: T
    source: str
    places: Mapping[str, str]

    def origin(self, key: str) -> str:
        """Return where the value of ``key`` comes from.

        Returns:
            ``file:line:column``, ``command line``, ``template`` or ``default``.
        """
        place = self.places.get(key, "default")
        return COMMAND_LINE if place.startswith(f"{COMMAND_LINE}: ") else place

    def place(self, key: str) -> str:
        """Return where to point at for ``key``: its own place, or that of the section it is in."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return f"{self.source} (default)"

    def problem_at(self, key: str, what: str, remedy: str, code: str) -> Problem:
        """Return a problem at a key of this conf, for what only later stages can see.

        Args:
            key: Dotted key.
            what: What is wrong, with the value.
            remedy: What to do.
            code: Stable code.
        """
        return Problem(code, what, self.place(key), key, remedy)

    def located(self, problem: Problem) -> Problem:
        """Return a problem that names a key of this conf with the key's place, if it has none."""
        if problem.where or not problem.key:
            return problem
        return replace(problem, where=self.place(problem.key))

    def resolved_yaml(self) -> str:
        """Return the whole conf as YAML, defaults included; loaded again it gives an equal one."""
        return yaml_text.block(plain(self.conf))


def load_conf(path: str | Path, overrides: Sequence[str] = (), *, kind: type[T]) -> Loaded[T]:
    """Load a conf file.

    Args:
        path: The file.
        overrides: Texts ``a.b=c`` that replace what the file says.
        kind: The dataclass that is wanted: one of ``KINDS``.

    Raises:
        ConfError: Everything that is wrong with the file, the overrides and the conf they make.
    """
    root, problems = _parsed(path)
    return _load(root, problems, overrides, kind, str(path))


def load_values(
    kind: type[T],
    values: Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    source: str = "template",
) -> Loaded[T]:
    """Load a conf, or a section of one such as a task, from plain Python data.

    Args:
        kind: The dataclass that is wanted.
        values: Keys and values; what is missing has its default.
        overrides: Texts ``a.b=c``.
        source: What messages call the place of the values.

    Raises:
        ConfError: Everything that is wrong with the values and overrides.
        TypeError: ``values`` holds something that is not plain data.
    """
    return _load(from_plain(dict(values), source), [], overrides, kind, source)


def load_task(path: str | Path) -> Task:
    """Return the task of a server or simulation conf.

    Raises:
        ConfError: The file is no conf, is wrong, or has no task.
    """
    loaded = load_conf(path, kind=KINDS[kind_of(path)])
    task = getattr(loaded.conf, "task", None)
    if not isinstance(task, Task):
        raise ConfError(
            Problem(
                "LF1020",
                "this conf has no task",
                str(path),
                "task",
                "name a server or simulation conf: its `task` section is read",
            )
        )
    return task


def kind_of(path: str | Path) -> str:
    """Return which kind of conf a file is: a key of ``KINDS``.

    Raises:
        ConfError: The file cannot be read, or does not say one kind that exists. What else is wrong
            with it is left to :func:`load_conf`, which reports it together with the rest.
    """
    root, problems = _parsed(path)
    said = root.content.get("kind") if isinstance(root.content, dict) else None
    if said is not None and (said.broken or said.repeated):
        raise ConfError(in_order(problems))
    try:
        return _said_kind(root, str(path))
    except ConfError as error:
        raise ConfError(in_order([*problems, *error.problems])) from None


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems in the order of the file, at most 20, the last of which counts the rest."""
    return capped(sorted(problems, key=_position), "LF1019")


def _position(problem: Problem) -> tuple[bool, int, int]:
    match = _PLACE.search(problem.where)
    if match is None or problem.where.startswith(COMMAND_LINE):
        return True, 0, 0
    return False, int(match[1]), int(match[2])


def _parsed(path: str | Path) -> tuple[Node, list[Problem]]:
    root, problems = parse(read_text(path), lambda line, column: f"{path}:{line}:{column}")
    if root is None:
        remedy = "write a new one with `lepton-fed init`"
        raise ConfError(Problem("LF1002", "the file is empty", str(path), remedy=remedy))
    if not isinstance(root.content, dict):
        what = f"a conf consists of keys and values, not {shown(root.plain)}"
        raise ConfError([Problem("LF1017", what, root.where, remedy="write `key: value` lines")])
    return root, problems


def _load(
    root: Node, problems: list[Problem], overrides: Sequence[str], kind: type[T], source: str
) -> Loaded[T]:
    wrong = apply(root, overrides)
    if kind in KINDS.values():
        _check_kind(root, kind, source)
    converter = Converter(kind)
    values = converter.convert(root)
    found = [*problems, *wrong, *converter.problems]
    # What is wrong is left at its default, so that contradictions elsewhere are found all the same.
    broken = [path for problem in found if (path := _path(problem.key))]
    for path in broken:
        _leave_out(values, path)
    _yield_defaults(values, converter.places)
    conf = cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
    loaded = Loaded(conf, source, converter.places)
    contradictions = problems_of(conf)
    if found:  # those that were written, not those of defaults that something else may mend
        given = (p for p in contradictions if p.key in converter.places)
        contradictions = [p for p in given if not _rests_on(p.key, broken)]
    found += map(loaded.located, contradictions)
    if found:
        raise ConfError(in_order(found))
    return loaded


Keys = tuple[str | int, ...]

# A contradiction found at a key that starts like the left rests on what starts like the right.
_RESTS_ON: tuple[tuple[Keys, Keys], ...] = (
    (("data",), ("data",)),
    (("metrics",), ("data", "target")),
    (("augmentation",), ("data",)),
    (("aggregation",), ("aggregation",)),
    (("training", "epochs"), ("training", "steps")),
    (("training", "steps"), ("training", "epochs")),
    (("training", "momentum"), ("training", "optimiser")),
    (("training", "schedule"), ("training", "schedule")),
    (("training", "schedule"), ("rounds",)),
    (("training", "max_gradient_norm"), ("privacy",)),
    (("aggregation",), ("privacy",)),
    (("privacy",), ("privacy",)),
    (("rounds",), ("rounds",)),
    (("rounds",), ("sites",)),
    (("sites",), ("sites",)),
    (("sites",), ("rounds",)),
)


def _path(key: str) -> Keys:
    try:
        return split(key)
    except ValueError:  # a key that no schema has, or none
        return ()


def _rests_on(key: str, broken: Sequence[Keys]) -> bool:
    """Return whether a contradiction at ``key`` may come from a value that is only a default."""
    path = _in_task(split(key))
    grounds = [path, *(other for own, other in _RESTS_ON if path[: len(own)] == own)]
    return any(
        one[: len(ground)] == ground or ground[: len(one)] == one
        for one in map(_in_task, broken)
        for ground in grounds
    )


def _in_task(path: Keys) -> Keys:
    return path[1:] if path[:1] == ("task",) and len(path) > 1 else path


def _leave_out(values: dict[str, Any], path: Keys) -> None:
    """Take a key out of nested values; of a list, the whole."""
    for part in path[:-1]:
        inner = values.get(part) if isinstance(part, str) else None
        if not isinstance(inner, dict):
            break
        values = inner
        path = path[1:]
    values.pop(str(path[0]), None)


def _said_kind(root: Node, source: str) -> str:
    node = root.content.get("kind") if isinstance(root.content, dict) else None
    kinds = ", ".join(KINDS)
    if node is None:
        what, remedy = (
            "the file does not say what it configures",
            f"write `kind:` and one of {kinds}",
        )
        raise ConfError(Problem("LF1005", what, source, "kind", remedy))
    if node.text not in KINDS:
        near = nearest(node.text or "", KINDS)
        hint = f"did you mean `{near}`? " if near else ""
        what = f"{shown(node.plain)} is no kind of conf"
        raise ConfError(Problem("LF1005", what, node.place, "kind", f"{hint}kinds: {kinds}"))
    return node.text


def _check_kind(root: Node, wanted: type, source: str) -> None:
    """Refuse a conf of another kind before its keys are looked at: they would all be unknown."""
    if not isinstance(root.content, dict) or "kind" not in root.content:
        return
    said = _said_kind(root, source)
    if KINDS[said] is not wanted:
        name = next(name for name, kind in KINDS.items() if kind is wanted)
        where = root.content["kind"].place
        what = f"this is a {said} conf; a {name} conf is wanted here"
        remedy = f"name a {name} conf, or write one with `lepton-fed init`"
        raise ConfError(Problem("LF1005", what, where, "kind", remedy))


def _yield_defaults(values: dict[str, Any], places: dict[str, str]) -> None:
    """Let the default of a key give way to what was given for the key that contradicts it.

    `steps: 5` alone means five steps, not five steps and the default one epoch; three names alone
    mean three sites. What was given for both keys stays, and the rules judge it. The key that gave
    way has the place of the one that was given.
    """
    for training in ("task.training", "training"):
        epochs, steps = f"{training}.epochs", f"{training}.steps"
        if steps in places and epochs not in places:
            section = _section(values, training)
            if section["steps"] is not None:
                section["epochs"], places[epochs] = None, places[steps]
    if "sites.names" in places and "sites.count" not in places:
        section = _section(values, "sites")
        if section["names"]:
            section["count"], places["sites.count"] = len(section["names"]), places["sites.names"]


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    for part in name.split("."):
        values = values[part]
    return values

"""From a conf document to typed values: every key checked by itself, so that all problems show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import (
    BooleanNode,
    FloatNode,
    IntegerNode,
    LiteralNode,
    OmegaConf,
    StringNode,
    ValidationError,
    ValueNode,
)

from lepton_fed.config.document import Node
from lepton_fed.config.hints import (
    advice,
    bounds,
    choices,
    element,
    is_section,
    optional,
    shown,
    words,
)
from lepton_fed.config.keys import Key, keys_of, walk
from lepton_fed.config.nearest import did_you_mean, nearest
from lepton_fed.core.settings import Setting
from lepton_fed.errors import Problem

__all__ = ["Converter"]

_NODES: dict[Any, Callable[..., ValueNode]] = {
    int: IntegerNode,
    float: FloatNode,
    bool: BooleanNode,
    str: StringNode,
}
_YES_NO = frozenset({"true", "false", "yes", "no", "on", "off"})
# OmegaConf would look these up or take them for a missing value; a conf has no such language.
_INTERPOLATION = re.compile(r"\$\{|^\\*\?\?\?$")


class Converter:
    """Walks a document along a dataclass schema.

    Args:
        schema: The dataclass of the whole conf.

    Attributes:
        problems: What is wrong, each with its place and key.
        places: Where every given key was written, by dotted key.
    """

    def __init__(self, schema: type) -> None:
        self._schema = schema
        self.problems: list[Problem] = []
        self.places: dict[str, str] = {}

    def convert(self, root: Node) -> dict[str, Any]:
        """Return the given keys of a document, as nested dicts and lists of typed values.

        Wherever a problem is reported the value is left out or arbitrary: only the result of a
        document without problems is one.
        """
        return self._section(root, self._schema, "")

    def _section(self, node: Node, section: type, name: str) -> dict[str, Any]:
        known = keys_of(section)
        if node.blank:  # a heading whose keys are all commented out
            node.content = {}
        if not isinstance(node.content, dict):
            if not node.broken:
                self._not_a_section(node, known, name)
            return {}
        values = {}
        for given, child in node.content.items():
            full = _join(name, given)
            if given in known:
                values[given] = self._key(child, known[given], full)
            else:
                self._unknown(child, given, known, full)
        misspelt = {nearest(given, known) for given in node.content if given not in known}
        for key in known.values():
            if key.required and key.name not in node.content and key.name not in misspelt:
                self._add(
                    "LF1016",
                    node,
                    _join(name, key.name),
                    f"`{key.name}` is missing",
                    f"give it: {key.setting.doc}",
                )
        return values

    def _key(self, node: Node, key: Key, name: str) -> Any:
        self.places[name] = node.place
        return self._value(node, key.hint, key.setting, name)

    def _value(self, node: Node, hint: Any, setting: Setting, name: str) -> Any:
        bare, or_null = optional(hint)
        if node.broken:
            return None
        if is_section(bare):
            return self._section(node, bare, name)
        if (inner := element(bare)) is not None:
            return self._list(node, inner, hint, setting, name)
        if bare == dict[str, Any]:
            return self._free_section(node, name)
        if node.content is None:
            if not or_null:
                self._null(node, bare, name)
            return None
        return self._leaf(node, bare, hint, setting, name)

    def _list(self, node: Node, inner: Any, hint: Any, setting: Setting, name: str) -> list[Any]:
        if node.blank:
            node.content = []
        if isinstance(node.content, list):
            values = []
            for index, child in enumerate(node.content):
                full = f"{name}[{index}]"
                self.places[full] = child.place
                values.append(self._value(child, inner, setting, full))
            return values
        lone = node.text if isinstance(node.content, (str, int, float)) else None
        if lone and is_section(inner):
            lone = _as_section(keys_of(inner), lone)
        what = f"wants {words(hint)}, not {_given(node)}"
        self._add("LF1017", node, name, what, f"write [{lone or '..., ...'}]")
        return []

    def _free_section(self, node: Node, name: str) -> dict[str, Any]:
        if node.blank:
            node.content = {}
        if isinstance(node.content, dict):
            return {key: self._free(child, f"{name}.{key}") for key, child in node.content.items()}
        self._add(
            "LF1017",
            node,
            name,
            f"wants a section of keys and values, not {_given(node)}",
            "write {name: value, ...}, or {} for none",
        )
        return {}

    def _free(self, node: Node, name: str) -> Any:
        self.places[name] = node.place
        if isinstance(node.content, dict):
            return {key: self._free(child, f"{name}.{key}") for key, child in node.content.items()}
        if isinstance(node.content, list):
            return [self._free(child, f"{name}[{i}]") for i, child in enumerate(node.content)]
        if self._interpolates(node, name) or not self._is_storable(node.content, node, name):
            return None
        return node.content

    def _leaf(self, node: Node, bare: Any, hint: Any, setting: Setting, name: str) -> Any:
        if isinstance(node.content, (dict, list)):
            what = f"wants {words(hint)}, not {_given(node)}"
            self._add("LF1017", node, name, what, advice(hint))
            return None
        if self._interpolates(node, name):
            return None
        try:
            value = _typed(node, bare)
        except ValidationError:
            self._wrong_type(node, hint, name)
            return None
        if not self._is_storable(value, node, name):
            return None
        if setting.complaint(value):
            remedy = f"it must be {bounds(setting)}"
            self._add("LF1015", node, name, f"{_given(node)} is out of range", remedy)
        return value

    def _wrong_type(self, node: Node, hint: Any, name: str) -> None:
        if named := [str(choice) for choice in choices(hint)]:
            near = nearest(node.text or "", named)
            remedy = f"did you mean `{near}`?" if near else advice(hint)
            self._add("LF1013", node, name, f"wants {words(hint)}, not {_given(node)}", remedy)
            return
        given, remedy = node.content, advice(hint)
        if optional(hint)[0] is int and isinstance(given, float) and given.is_integer():
            remedy = f"write {int(given)}"
        self._add("LF1012", node, name, f"wants {words(hint)}, not {_given(node)}", remedy)

    def _is_storable(self, value: object, node: Node, name: str) -> bool:
        """Return whether a number is one that tensors and files can hold."""
        if isinstance(value, float) and not math.isfinite(value):
            what, remedy = f"{node.text} is not a finite number", "choose a finite one"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            what = f"{node.text} does not fit into 64 bits"
            remedy = "it must be from -2^63 to 2^63 - 1"
        else:
            return True
        self._add("LF1015", node, name, what, remedy)
        return False

    def _interpolates(self, node: Node, name: str) -> bool:
        found = isinstance(node.content, str) and _INTERPOLATION.search(node.content) is not None
        if found:
            self._add(
                "LF1018",
                node,
                name,
                f"{_given(node)} is a placeholder: a conf has none",
                f"write the value itself, or give it on the command line: {name}=value",
            )
        return found

    def _null(self, node: Node, bare: Any, name: str) -> None:
        what = "no value is given" if node.blank else "must not be null"
        remedy = 'write "" for empty text' if bare is str else f"write {words(bare)}"
        self._add("LF1014", node, name, what, f"{remedy}, or leave the key out for its default")

    def _not_a_section(self, node: Node, known: dict[str, Key], name: str) -> None:
        remedy = f"keys here: {', '.join(known)}"
        if isinstance(node.content, str) and (section := _as_section(known, node.content)):
            remedy = f"write {section}"
        elif isinstance(node.content, list):
            remedy = f"leave out the dashes; {remedy}"
        what = f"wants a section of keys and values, not {_given(node)}"
        self._add("LF1017", node, name, what, remedy)

    def _unknown(self, node: Node, key: str, known: dict[str, Key], name: str) -> None:
        elsewhere = [full for full, other in walk(self._schema) if other.name == key]
        remedy = did_you_mean(key, known, noun="keys here")
        if elsewhere:
            remedy = f"{remedy}; `{key}` is a key of another section: {', '.join(elsewhere[:3])}"
        # The name is to blame, not the value.
        where = node.name_where or node.where
        self.problems.append(Problem("LF1011", f"unknown key `{key}`", where, name, remedy))

    def _add(self, code: str, node: Node, name: str, what: str, remedy: str = "") -> None:
        self.problems.append(Problem(code, what, node.place, name, remedy))


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _as_section(known: dict[str, Key], text: str) -> str:
    """Return ``text`` as the one key that a section needs; empty if it needs none or several."""
    needed = [key.name for key in known.values() if key.required]
    return f"{{{needed[0]}: {text}}}" if len(needed) == 1 else ""


def _typed(node: Node, hint: Any) -> Any:
    """Return a scalar as a value of a simple type or of a Literal.

    Raises:
        ValidationError: It is of another type.
    """
    if choices(hint):
        leaf: ValueNode = LiteralNode(ref_type=hint, value=node.text, is_optional=False)
    elif hint is bool and str(node.content).lower() not in _YES_NO:
        raise ValidationError("OmegaConf would take any whole number for true")
    else:
        leaf = _NODES[hint](value=node.text if hint is str else node.content)
    return OmegaConf.create([leaf])[0]


def _given(node: Node) -> str:
    """Return what stands in the document, as it was written."""
    if isinstance(node.content, str) or node.text is None:
        return shown(node.content if isinstance(node.content, str) else node.plain)
    return "nothing" if node.blank else node.text

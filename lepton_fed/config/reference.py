"""The reference of the conf files, generated from the schema."""

from __future__ import annotations

from lepton_fed.config.hints import bounds, words
from lepton_fed.config.keys import Key, walk
from lepton_fed.config.schema import KINDS
from lepton_fed.config.yaml_text import flow
from lepton_fed.core.digests import plain

__all__ = ["conf_reference", "reference_markdown"]

_INTRODUCTION = """\
# Conf files

A conf is one YAML file; its `kind` says what it configures. `lepton-fed init` writes a commented
one, `lepton-fed check --conf FILE` finds everything that is wrong with it and starts nothing,
`lepton-fed config explain KEY` says what a key means and where its present value comes from.

- **Defaults.** A key that is left out has its default. Keys that do not exist are errors.
- **Overrides.** Every command takes `key=value` arguments, which take the place of what the file
  says: `rounds.count=5`, `task.metrics=[accuracy]`, `task.preprocessing[0].arguments.by=255`. The
  value is YAML; nothing after the `=` is empty text.
- **YAML.** Values are read by the rules of YAML 1.2: `1e-5` is a number, `010` is ten, only `true`
  and `false` are booleans (a key that wants one also takes `yes`, `no`, `on`, `off`), and a key
  that wants text takes it as it is written: the class names `[0, 1.0, no]` need no quotes. Anchors,
  aliases, tags and `${...}` are refused: every value has one place.
- **Lists.** `columns[].std` is the key `std` of each element of `columns`; in an override and in
  messages the element has its number, from 0.
- **Steps and epochs.** `task.training.steps` alone replaces the default `epochs: 1`; both together
  are an error. In the same way `sites.names` alone gives `sites.count`.

The tables below are generated from the schema.
"""


def conf_reference() -> str:
    """Return the whole reference page as Markdown."""
    parts = [f"## `kind: {kind}`\n\n{reference_markdown(kind)}" for kind in KINDS]
    return "\n".join([_INTRODUCTION, *parts])


def reference_markdown(kind: str) -> str:
    """Return a Markdown table of every key of a conf.

    Args:
        kind: A key of ``KINDS``.
    """
    rows = [_row(name, key) for name, key in walk(KINDS[kind])]
    head = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _row(name: str, key: Key) -> tuple[str, ...]:
    default = f"`{flow(plain(key.default))}`" if not key.required else "must be given"
    if key.section is not None and not key.is_list:
        default = ""
    limits = bounds(key.setting)
    unit = f" Unit: {key.setting.unit}." if key.setting.unit else ""
    meaning = f"{key.setting.doc}{unit}".replace("|", r"\|")
    return f"`{name}`", words(key.hint), default, limits, meaning

"""Whatever a conf says, the resolved conf says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.config.document import parse
from lepton_fed.config.load import load_conf, load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.yaml_text import flow
from lepton_fed.core.digests import plain

_NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True)
# Text that a conf may hold: no placeholders, nothing that UTF-8 or YAML cannot carry.
_TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="$?￾￿"),
    min_size=1,
    max_size=12,
) | st.sampled_from(
    ["no", "1e-5", "007", "true", "null", "~", "1:30", "a: b", "- x", "#", "{", " "]
)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | _FINITE | _TEXT
_FREE = st.dictionaries(
    _TEXT,
    st.recursive(
        _SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def _section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


_CONFS = st.fixed_dictionaries(
    {
        "task": st.fixed_dictionaries(
            {
                "data": st.fixed_dictionaries(
                    {
                        "kind": st.just("image"),
                        "shape": st.lists(st.integers(1, 64), min_size=3, max_size=3),
                        "target": st.fixed_dictionaries(
                            {"classes": st.lists(_TEXT, min_size=2, max_size=5, unique=True)}
                        ),
                    },
                    optional={"dtype": st.sampled_from(["float32", "uint8"])},
                )
            },
            optional={
                "name": _NAMES,
                "preprocessing": st.lists(
                    st.fixed_dictionaries({"step": _TEXT}, optional={"arguments": _FREE}),
                    max_size=3,
                ),
                "model": _section(arguments=_FREE, local=st.lists(_TEXT, max_size=2)),
                "training": st.one_of(
                    _section(
                        epochs=st.integers(1, 9),
                        learning_rate=st.floats(1e-9, 1e3),
                        weight_decay=st.floats(0, 1),
                    ),
                    st.fixed_dictionaries({"steps": st.integers(1, 10**6)}),
                ),
                "metrics": st.lists(st.sampled_from(["accuracy", "recall"]), unique=True),
            },
        ),
        "sites": st.fixed_dictionaries(
            {},
            optional={
                "names": st.lists(_NAMES, min_size=1, max_size=6, unique=True),
                "source": _section(path=_TEXT, arguments=_FREE),
                "held_out": st.floats(0.01, 0.9),
            },
        ),
    },
    optional={
        "strategy": _section(arguments=_FREE),
        "rounds": _section(count=st.integers(1, 10**6), fraction=st.floats(1e-6, 1)),
        "seed": st.integers(0, 2**53 - 1),
        "runs": st.from_regex(r"[^$?\x00-\x1f\x7f-\x9f\ud800-\udfff￾￿]*[a-z]", fullmatch=True),
    },
)


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the keys that a schema knows, sections opened, free arguments as they are."""
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "arguments":
            found += _leaves(value, f"{name}.")
        else:
            found.append((name, value))
    return found


@settings(max_examples=20, deadline=None)
@given(values=_CONFS)
def test_overrides_and_resolved_conf_say_the_same_as_the_values(
    values: dict[str, Any], tmp_path_factory: Any
) -> None:
    conf = load_values(SimulationConf, values).conf
    overrides = [f"{name}={flow(value)}" for name, value in _leaves(values)]
    loaded = load_values(SimulationConf, {}, overrides)
    assert loaded.conf == conf
    path = Path(tmp_path_factory.getbasetemp()) / "resolved.yaml"
    path.write_text(loaded.resolved_yaml(), encoding="utf-8", newline="")
    assert load_conf(path, kind=SimulationConf).conf == conf


@settings(max_examples=100, deadline=None)
@given(value=st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner)))
def test_what_is_written_reads_back_here_and_in_any_yaml_1_1_reader(value: Any) -> None:
    text = flow({"key": value})
    root, problems = parse(text, lambda line, column: f"{line}:{column}")
    assert root is not None
    assert not problems
    assert root.plain == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_a_resolved_conf_is_plain_data_that_any_reader_reads() -> None:
    values = {"task": {"data": {"kind": "image", "shape": [1, 2, 2], "target": {"classes": "ab"}}}}
    values["task"]["data"]["target"]["classes"] = ["no", "1e-5"]
    loaded = load_values(SimulationConf, values)
    assert yaml.safe_load(loaded.resolved_yaml()) == plain(loaded.conf)

"""docs/how-to/monitor.md: its metrics are those that are exported, its rules and conf are valid."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lepton_fed.config.schema import ServerConf
from lepton_fed.server.monitor import Monitor

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "monitor.md").read_text()
TIME = "2026-01-01T00:00:00.000+00:00"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def rows(first_heading: str) -> list[list[str]]:
    table = PAGE.split(f"| {first_heading} |", 1)[1].split("|---", 1)[1].split("\n\n", 1)[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[1:]]


def used() -> Monitor:
    """A monitor that has seen one of everything."""
    monitor = Monitor(lambda: ["a"], lambda: ["a"])
    about = {"time": TIME, "previous": ""}
    events: list[dict[str, Any]] = [
        {"event": "run.started", "run": "r", "rounds": 3, "strategy": "fedavg", "sites": ["a"]},
        {"event": "reply.accepted", "round": 1, "site": "a", "bytes": 1},
        {"event": "round.closed", "round": 1, "rounds": 3, "sites": ["a"], "sent_bytes": 1,
         "seconds": dict.fromkeys(("select", "exchange", "aggregate", "checkpoint"), 1.0)},
    ]  # fmt: skip
    for event in events:
        monitor({**about, **event})
    return monitor


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric, by name; those that the library adds are left out."""
    found: dict[str, tuple[str, set[str]]] = {}
    text = generate_latest(used()._registry).decode()
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        labels = {label for sample in family.samples for label in sample.labels}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, labels - {"le"})
    return found


def test_the_metrics_of_the_page_are_those_that_are_exported(exported: Any) -> None:
    listed = {
        row[0].strip("`"): (row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in rows("metric")
    }
    assert listed == exported


def test_the_keys_of_health_are_those_of_the_page() -> None:
    keys = [row[0].strip("`") for row in rows("key")]
    assert keys == list(used().health())
    (shown,) = (json.loads(line) for line in PAGE.splitlines() if line.startswith('{"status'))
    assert list(shown) == keys


def test_prometheus_is_pointed_at_the_default_address() -> None:
    scrape = yaml.safe_load(blocks("yaml")[0])["scrape_configs"]
    assert scrape[0]["static_configs"] == [{"targets": [ServerConf().monitor]}]
    assert f"http://{ServerConf().monitor}/health" in PAGE


def test_every_rule_asks_for_metrics_and_labels_that_are_exported(exported: Any) -> None:
    (group,) = yaml.safe_load(blocks("yaml")[1])["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) >= 5
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for"}
        asked = re.findall(r"(lepton_fed_\w+)(?:\{(\w+)=)?", rule["expr"])
        assert asked or rule["expr"].startswith("up{")
        for name, label in asked:
            assert name in exported, rule
            assert not label or label in exported[name][1], rule
        assert rule["expr"].count("(") == rule["expr"].count(")")

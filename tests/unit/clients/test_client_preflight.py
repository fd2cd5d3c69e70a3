"""What a site's owner can check before the first contact."""

from __future__ import annotations

import pytest

from lepton_fed.clients.preflight import check_client
from lepton_fed.config import yaml_text
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import ClientConf, ServerConf
from lepton_fed.config.templates import template
from lepton_fed.core.digests import plain
from lepton_fed.export.keys import generate_key


@pytest.fixture
def conf(tmp_path):
    """Return a client's conf whose task and key are there."""
    server = load_values(ServerConf, template("server")).conf
    (tmp_path / "server.yaml").write_text(yaml_text.block(plain(server)))
    generate_key(tmp_path / "coordinator.pem")
    values = {
        "task": str(tmp_path / "server.yaml"),
        "coordinator_key": str(tmp_path / "coordinator.pub"),
    }

    def one(*overrides):
        return load_values(ClientConf, {**template("client"), **values}, list(overrides)).conf

    return one


def found(conf):
    checks = check_client(conf)
    details = {check.name: check.detail for check in checks.checks if not check.problems}
    codes = {check.name: check.problems[0].code for check in checks.checks if check.problems}
    return details, codes, checks.exit_code


def test_a_sound_conf_is_described(conf):
    details, codes, exit_code = found(conf())
    assert (codes, exit_code) == ({}, 0)
    assert set(details) == {"task", "data", "device", "coordinator key"}
    assert details["task"].startswith("digits, ")
    assert details["data"] == "1797 rows fit the task's contract"
    assert details["device"] == "cpu"
    assert len(details["coordinator key"].split()) == 16, "a fingerprint to compare by eye"


def test_several_failures_are_reported_together(conf):
    details, codes, exit_code = found(
        conf("source.reader=wine", "device=cuda:63", "coordinator_key=nowhere.pub")
    )
    assert set(details) == {"task"}
    assert codes == {
        "data": "LF2020",
        "device": "LF1102",
        "coordinator key": codes["coordinator key"],
    }
    assert codes["coordinator key"].startswith("LF41")
    assert exit_code == 3, "that of the first failure"


def test_data_is_not_judged_against_a_task_that_is_not_there(conf):
    details, codes, exit_code = found(conf("task=nowhere.yaml"))
    assert codes == {"task": "LF1001"}
    assert "data" not in details
    assert exit_code == 2

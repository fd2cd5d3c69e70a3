"""Attacks on a run: whose rows are attacked, what is received, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lepton_fed.audit.attacks import attack
from lepton_fed.audit.claims import Claims, claims_of_run
from lepton_fed.audit.mechanism import mechanism_of
from lepton_fed.audit.one_round import OneRound, as_trained_by, of_one_record
from lepton_fed.audit.report import Attack, Attacks
from lepton_fed.audit.rows import mislabelled, rows_for
from lepton_fed.cli import app
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import ClientConf, ServerConf, SimulationConf, Source
from lepton_fed.config.templates import template
from lepton_fed.core.digests import canonical_json
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.step_noise import IndependentSteps
from lepton_fed.runs.folder import RunFolder
from lepton_fed.simulations.sequential import simulate
from lepton_fed.training.kit import build_kit

WORDS = (
    "sites.count=1", "sites.names=[east]", "rounds.count=1", "rounds.quorum=1",
    "task.model={name: linear}", "task.training.epochs=null", "task.training.steps=10",
    "task.training.batch_size=2000", "task.training.learning_rate=2", "task.training.momentum=0",
    "privacy.secure_aggregation.enabled=false", "privacy.record.epsilon=1",
    "privacy.record.sampler=full",
)  # fmt: skip
PLAIN = ("privacy.record.enabled=false", "privacy.outside_epsilon=[]")
MASKED = (
    "sites.count=3", "sites.names=[]", "rounds.quorum=3", "privacy.secure_aggregation.enabled=true",
)  # fmt: skip
SHARED = (
    *MASKED, "task.training.steps=1", "privacy.record.noise=shared", "privacy.record.honest=3",
    "privacy.record.sampling_rate=0.5", "privacy.record.sampler=poisson",
    "task.training.batch_size=180",
)  # fmt: skip


def run_of(folder: Path, *more: str) -> RunFolder:
    words = [*WORDS, *more, f"runs={folder / 'runs'}"]
    return simulate(load_values(SimulationConf, template("simulation"), words)).folder


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_of(tmp_path_factory.mktemp("private"))


def of(found: Attacks) -> tuple[Attack, Attack]:
    membership, inversion = found.attacks
    assert (membership.name, inversion.name) == ("membership", "inversion")
    return membership, inversion


def test_noise_keeps_members_as_hidden_as_epsilon_says_and_records_hidden(
    private: RunFolder,
) -> None:
    found = attack(claims_of_run(private), 12)
    membership, inversion = of(found)
    assert membership.passed
    assert membership.numbers["epsilon"] == pytest.approx(1.0, rel=0.01)
    assert membership.numbers["most"] == pytest.approx(0.0272, abs=1e-3)
    assert "at most 2.7%" in membership.found
    assert inversion.passed is None
    assert "no better than by guessing" in inversion.found
    assert (
        min(inversion.numbers["division"], inversion.numbers["matching"])
        > (inversion.numbers["guess"])
    )
    assert found.received == "each update, with noise"
    assert found.rows == "the simulation's own"
    assert (found.records, found.shadows) == (400, 12)


def test_noise_that_is_claimed_and_not_there_fails_the_audit(
    private: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = IndependentSteps.__init__

    def faulty(self: IndependentSteps, std: float, entropy: Entropy) -> None:
        sound(self, 0.0 * std, entropy)

    monkeypatch.setattr(IndependentSteps, "__init__", faulty)
    result = CliRunner().invoke(
        app, ["audit", str(private.path), "--attacks", "--shadows", "16", "--canaries", "200"]
    )
    assert result.exit_code == 4, result.output
    assert "LF4705" in result.output
    report = json.loads((private.path / "audit.json").read_text())
    membership, inversion = report["attacks"]["attacks"]
    assert membership["passed"] is False
    assert not report["passed"]
    assert "BETTER than by guessing" in inversion["found"]
    shown = CliRunner().invoke(app, ["runs", "show", str(private.path)])
    assert "membership" in shown.output


def test_a_run_that_claims_nothing_is_attacked_all_the_same(tmp_path: Path) -> None:
    run = run_of(tmp_path, *PLAIN)
    refused = CliRunner().invoke(app, ["audit", str(run.path)])
    assert refused.exit_code == 5
    assert "LF5232" in refused.output
    assert "--attacks" in refused.output
    result = CliRunner().invoke(app, ["audit", str(run.path), "--attacks", "--shadows", "16"])
    assert result.exit_code == 0, result.output
    assert "membership    note" in result.output
    assert "nothing is claimed of records" in result.output
    assert "audited" not in result.output
    report = json.loads((run.path / "audit.json").read_text())
    assert report["checks"] == []
    assert report["epsilon"] is None
    membership = report["attacks"]["attacks"][0]["numbers"]
    assert membership["low"] > 0.03
    shown = CliRunner().invoke(app, ["runs", "show", str(run.path)])
    assert "no epsilon is claimed" in shown.output


def test_a_masked_sum_is_attacked_as_the_sum_that_it_is(tmp_path: Path) -> None:
    run = run_of(tmp_path, *PLAIN, *MASKED)
    found = attack(claims_of_run(run), 12)
    assert found.received == "the sum of 3 updates"
    plain = attack(replace_masks(claims_of_run(run)), 12)
    assert of(found)[0].numbers["auc"] < of(plain)[0].numbers["auc"]


def replace_masks(claims: Claims) -> Claims:
    privacy = claims.agreement.privacy
    secure = replace(privacy.secure_aggregation, enabled=False)
    agreement = replace(claims.agreement, privacy=replace(privacy, secure_aggregation=secure))
    return replace(claims, agreement=agreement)


def test_shares_of_the_noise_are_in_the_sum_that_is_attacked(tmp_path: Path) -> None:
    claims = claims_of_run(run_of(tmp_path, *SHARED))
    found = attack(claims, 8)
    assert found.received == "the sum of 3 updates and shares of the noise"
    assert of(found)[0].passed
    mechanism = mechanism_of(claims)
    agreement = of_one_record(claims.agreement, mechanism)
    kit = build_kit(agreement.task, 1)
    one = OneRound(agreement, kit, tmp_path / "one")
    data, _ = rows_for(claims, np.random.default_rng(0))
    reply = one.train(data.take(np.array([0])))
    assert reply.update is not None
    (delta,) = reply.update.vectors.values()
    noise = one.receive(reply, [reply, reply]) - delta
    moves = claims.record.clip * 2.0 / 180
    wanted = mechanism.noise_multiplier * moves / 3
    assert noise.std() == pytest.approx(wanted, rel=4 / np.sqrt(2 * noise.size))


def test_a_site_of_a_few_rows_does_what_the_run_s_sites_did(private: RunFolder) -> None:
    claims = claims_of_run(private)
    mechanism = replace(mechanism_of(claims), rate=0.1, steps=20, sampler="poisson")
    few = as_trained_by(claims.agreement, mechanism, 200).task.training
    assert (few.batch_size, few.steps, few.epochs) == (20, 20, None)
    alone = of_one_record(claims.agreement, mechanism).task.training
    assert (alone.batch_size, alone.steps) == (1, 2)
    assert as_trained_by(claims.agreement, None, 200) == claims.agreement


def named(claims: Claims, conf: ServerConf | ClientConf) -> Claims:
    return replace(claims, conf=conf)


def test_a_coordinator_s_rows_are_made_up_and_a_site_s_are_its_own(private: RunFolder) -> None:
    claims, draws = claims_of_run(private), np.random.default_rng(0)
    data, whose = rows_for(named(claims, ServerConf()), draws)
    assert whose == "made up"
    assert 10 < data.inputs.max() <= 16  # as large as what `scale` divides by
    data, whose = rows_for(named(claims, replace(ClientConf(), source=Source("digits"))), draws)
    assert whose == "this site's own"
    assert len(data) == 1797


def test_at_a_site_its_own_rows_are_attacked(private: RunFolder, tmp_path: Path) -> None:
    claims = claims_of_run(private)
    (tmp_path / "agreements").mkdir()
    kept = tmp_path / "agreements" / f"{claims.agreement.digest}.json"
    kept.write_bytes(canonical_json(claims.agreement))
    conf = tmp_path / "client.yaml"
    conf.write_text(f"kind: client\nname: east\nstate: {tmp_path}\nsource: {{reader: digits}}\n")
    words = ("--site", str(conf), "--attacks", "--shadows", "8", "--canaries", "200", "--json")
    result = CliRunner().invoke(app, ["audit", "last", *words])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["attacks"]["rows"] == "this site's own"
    assert report["attacks"]["received"] == "each update, with noise"
    (written,) = (tmp_path / "audits").glob("*.json")
    assert json.loads(written.read_text()) == report


def test_a_fifth_has_another_s_target(private: RunFolder) -> None:
    data, _ = rows_for(claims_of_run(private), np.random.default_rng(0))
    other = mislabelled(data, np.random.default_rng(1))
    assert 0.15 < np.mean(other.targets != data.targets) < 0.2
    np.testing.assert_array_equal(np.bincount(other.targets), np.bincount(data.targets))


def _of_table(folder: Path, words: Sequence[str], task: dict[str, Any]) -> Claims:
    values = template("simulation")
    values["task"] = task
    loaded = load_values(
        SimulationConf, values, [*words, *PLAIN, "sites.partition={name: iid}",
                                 f"runs={folder / 'runs'}"]
    )  # fmt: skip
    return claims_of_run(simulate(loaded).folder)


TRAINING = {"epochs": 1, "batch_size": 20, "learning_rate": 0.05}


def test_a_number_is_guessed_by_the_mean_of_all(tmp_path: Path) -> None:
    names = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
    task = {
        "name": "diabetes",
        "data": {
            "columns": [{"name": name} for name in names],
            "target": {"kind": "number", "name": "target"},
        },
        "model": {"name": "linear"},
        "training": {**TRAINING, "learning_rate": 1e-4},
    }
    words = (
        "sites.source={reader: diabetes}", "sites.count=1", "sites.names=[]", "rounds.count=1",
        "rounds.quorum=1", "privacy.secure_aggregation.enabled=false",
    )  # fmt: skip
    membership, inversion = of(attack(_of_table(tmp_path, words, task), 8))
    assert membership.numbers["members"] > 500
    assert inversion.numbers["division"] < inversion.numbers["guess"]


def test_words_have_no_mean_and_few_rows_no_rates(tmp_path: Path) -> None:
    lines = [f"{'red' if n % 2 else 'blue'},{n % 7},{'yes' if n % 3 else 'no'}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["colour,size,label", *lines]) + "\n")
    task = {
        "name": "words",
        "data": {
            "columns": [
                {"name": "colour", "kind": "category", "values": ["red", "blue"]},
                {"name": "size"},
            ],
            "target": {"classes": ["no", "yes"]},
        },
        "preprocessing": [{"step": "one_hot"}],
        "model": {"name": "linear"},
        "training": TRAINING,
    }
    words = (
        f"sites.source={{reader: csv, path: {tmp_path / 'rows.csv'}}}", "sites.count=1",
        "sites.names=[]", "rounds.count=1", "rounds.quorum=1",
        "privacy.secure_aggregation.enabled=false",
    )  # fmt: skip
    membership, inversion = of(attack(_of_table(tmp_path, words, task), 8))
    assert membership.found == "not done: 30 records are too few to tell rates of"
    assert inversion.found == "not done: colour has words, which have no mean to guess"
    assert membership.numbers == inversion.numbers == {}

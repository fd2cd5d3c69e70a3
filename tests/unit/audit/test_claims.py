"""What an audit reads of a run's folder and of a site's own records."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.audit.claims import claims_of_run, claims_of_site
from lepton_fed.audit.mechanism import Mechanism, mechanism_of
from lepton_fed.audit.report import AuditReport, Check, read_report, write_report
from lepton_fed.audit.run import audit
from lepton_fed.clients.receipts import Receipts, receipt_of
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import (
    ClientConf,
    Privacy,
    RecordPrivacy,
    SimulationConf,
    StrategyConf,
)
from lepton_fed.config.templates import template
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.core.task import Task
from lepton_fed.errors import Refused, RunError
from lepton_fed.privacy.dp.accounting import CorrelatedGaussian, SampledGaussian, epsilon_of
from lepton_fed.privacy.dp.shared import honest_of
from lepton_fed.privacy.ledger import Ledger
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.chain import Chain
from lepton_fed.runs.folder import RunFolder
from lepton_fed.simulations.sequential import simulate

WORDS = (
    "sites.count=1", "sites.names=[east]", "rounds.count=2", "rounds.quorum=1",
    "task.model={name: linear}", "task.training.epochs=null", "task.training.steps=2",
    "privacy.secure_aggregation.enabled=false",
)  # fmt: skip
EVENT = SampledGaussian(2.0, 0.25, 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    words = [*WORDS, f"runs={tmp_path_factory.mktemp('runs')}"]
    return simulate(load_values(SimulationConf, template("simulation"), words)).folder


@pytest.fixture
def run(made: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(made.path, tmp_path / made.name)))


def test_a_simulation_says_what_its_ledgers_say(run: RunFolder) -> None:
    claims = claims_of_run(run)
    (site,) = claims.sites
    assert site.rounds == 2
    assert site.charged is not None
    assert len(site.charged) == 2
    assert claims.verdict == run.path / "audit.json"
    charged = site.charged[0]
    assert mechanism_of(claims) == Mechanism(
        charged.noise_multiplier, charged.sampling_rate, 2, 2, "poisson"
    )  # fmt: skip
    summary = run.read_summary()
    assert summary is not None
    assert site.epsilon == summary.sites[0].epsilon


def test_reading_a_ledger_does_not_touch_it(run: RunFolder) -> None:
    path = run.site("east") / "ledger.sqlite"
    before = path.read_bytes()
    claims_of_run(run)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_changed_ledger_is_refused(run: RunFolder) -> None:
    path = run.site("east") / "ledger.sqlite"
    content = path.read_bytes()
    assert b'"steps":2' in content
    path.write_bytes(content.replace(b'"steps":2', b'"steps":1'))
    with pytest.raises(Refused, match="LF4204"):
        claims_of_run(run)


def test_an_entry_that_no_ledger_writes_is_refused(run: RunFolder) -> None:
    chain = Chain(run.site("east") / "ledger.sqlite")
    with chain.writing() as transaction:
        transaction.append(transaction.head(), {"kind": "refunded", "time": "now"})
    with pytest.raises(Refused, match="LF4204"):
        claims_of_run(run)


def test_the_sampler_of_a_run_is_the_one_that_is_audited(run: RunFolder) -> None:
    shutil.rmtree(run.path / "sites")
    run.conf.write_text(run.conf.read_text().replace("sampler: poisson", "sampler: shuffled"))
    mechanism = mechanism_of(claims_of_run(run))
    assert mechanism.sampler == "shuffled"
    assert (mechanism.steps_a_pass, mechanism.passes) == (16, 1)


def test_without_ledgers_a_site_of_a_thousand_rows_is_assumed(run: RunFolder) -> None:
    shutil.rmtree(run.path / "sites")
    claims = claims_of_run(run)
    assert claims.sites[0].charged is None
    assert mechanism_of(claims).rate == 64 / 1000


def test_a_run_that_is_not_finished_or_claims_nothing_is_refused(run: RunFolder) -> None:
    conf, summary = run.conf.read_text(), (run.path / "summary.json").read_bytes()
    (run.path / "summary.json").unlink()
    with pytest.raises(RunError, match="LF5206"):
        claims_of_run(run)
    run.conf.write_text(conf.replace("enabled: true", "enabled: false"))
    (run.path / "summary.json").write_bytes(summary)
    with pytest.raises(RunError, match="LF5232"):
        audit(claims_of_run(run))


def site_of(
    folder: Path, *, epsilon: float | None = 1.5, **other: Any
) -> tuple[ClientConf, Agreement]:
    """A site that took part in two rounds of a run, and charged another one before."""
    record = replace(RecordPrivacy(True, 4.0, 1e-5, 1.0), **other)
    agreement = Agreement("20260101T000000Z-t-aaaa", Task(), StrategyConf(), 3, 1, Privacy(record))
    agreements = folder / "agreements"
    agreements.mkdir()
    (agreements / f"{agreement.digest}.json").write_bytes(canonical_json(agreement))
    ledger = Ledger(
        folder / "ledger.sqlite", dataset="d", content="c", epsilon=50.0, delta=1e-5
    )  # fmt: skip
    for number, digest in enumerate(("other", agreement.digest, agreement.digest), start=1):
        ledger.charge(EVENT, RunName(agreement.run, digest), number, "task")
    ledger.close()
    receipts = Receipts(folder / "receipts")
    about = dict.fromkeys(("time", "site", "coordinator", "address", "task", "policy"), "x")
    for number in (1, 2, 2):
        vector = np.ones(3, np.float32)
        update = Update("layout", {"delta": vector}, 1.0, {"delta": 1.0})
        ask = Ask(agreement.digest, "layout", number, True, False, {})
        said = epsilon and epsilon * number
        receipts.write(
            receipt_of(Reply("east", update, epsilon=said), ask, {**about, "run": agreement.run})
        )
    return replace(ClientConf(), name="east", state=str(folder)), agreement


def test_a_site_s_own_records_are_its_agreement_ledger_and_receipts(tmp_path: Path) -> None:
    conf, agreement = site_of(tmp_path)
    for words in (agreement.run, "aaaa", "last"):
        claims = claims_of_site(words, conf)
        (site,) = claims.sites
        assert (site.name, site.epsilon, site.rounds) == ("east", 3.0, 2)
        assert site.charged == (EVENT, EVENT)
        assert claims.agreement == agreement
        assert claims.verdict.parent == tmp_path / "audits"
    with pytest.raises(RunError, match="LF5205"):
        claims_of_site("bbbb", conf)


def test_a_site_that_tells_no_epsilon_claims_none(tmp_path: Path) -> None:
    conf, _ = site_of(tmp_path, epsilon=None)
    assert claims_of_site("last", conf).sites[0].epsilon is None


def test_a_site_of_a_run_with_shared_noise_says_how_many_shares_are_counted_on(
    tmp_path: Path,
) -> None:
    conf, agreement = site_of(tmp_path, noise="shared", sampling_rate=0.1)
    claims = claims_of_site("last", conf)
    assert claims.honest == honest_of(agreement)
    event = replace(EVENT, steps=1)
    claims = replace(claims, sites=(replace(claims.sites[0], charged=(event,)),))
    assert mechanism_of(claims) == Mechanism(2.0, 0.25, 1, 3, "poisson")
    # Where no ledger is at hand, noise and rate are those that were agreed on.
    silent = replace(claims.sites[0], charged=None)
    agreed = replace(claims.agreement, noise_multiplier=1.5)
    claims = replace(claims, sites=(silent,), agreement=agreed)
    assert mechanism_of(claims) == Mechanism(1.5, 0.1, 1, 3, "poisson")


def test_correlated_noise_is_audited_as_what_was_charged(run: RunFolder, tmp_path: Path) -> None:
    conf, _ = site_of(tmp_path, mechanism="dp_ftrl", sampler="full")
    claims = claims_of_site("last", conf)
    task = claims_of_run(run).agreement.task
    claims = replace(claims, agreement=replace(claims.agreement, task=task))
    first = CorrelatedGaussian(1.5, 0.25, 6, 0, 18, 4, 8)
    again = replace(first, first=6, steps=0)
    site = replace(claims.sites[0], charged=(again, first))
    mechanism = mechanism_of(replace(claims, sites=(site,)))
    assert mechanism == Mechanism(1.5, 0.25, 6, 3, "full", 8)
    assert mechanism.event == first
    assert mechanism.event.times(3).end == 18
    unknown = mechanism_of(replace(claims, sites=(replace(site, charged=None),)))
    assert unknown.band > 1
    assert epsilon_of([unknown.event.times(3)], claims.record.delta) <= claims.record.epsilon


def test_a_report_reads_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.json"
    check = Check("noise", False, "half of it", {"estimated": 1.0})
    report = AuditReport(
        "run",
        False,
        [check],
        1.0,
        0.5,
        0.95,
        1e-5,
        "add-or-remove-one",
        "poisson",
        10,
        200,
        "2026-01-01T00:00:00+00:00",
        1.0,
        "1",
    )
    assert read_report(path) is None
    write_report(report, path)
    assert read_report(path) == report
    assert report.verdict == "FAILED 2026-01-01 00:00 UTC: noise"
    assert "between 0.50 (proved) and 1.00" in replace(report, passed=True).verdict
    path.write_text(json.dumps({"run": "run"}))
    with pytest.raises(RunError, match="LF5233"):
        read_report(path)


def test_a_long_run_is_shortened_and_a_short_one_repeated() -> None:
    def shortened(steps: int, rounds: int) -> tuple[int, int]:
        short = Mechanism(1.0, 0.1, steps, rounds, "poisson").shortened()
        return short.steps, short.rounds

    assert shortened(14, 20) == (14, 20)
    assert shortened(100, 100) == (10, 30)
    assert shortened(5000, 1) == (300, 1)
    assert shortened(1, 3) == (1, 20)
    assert shortened(1, 400) == (1, 30)

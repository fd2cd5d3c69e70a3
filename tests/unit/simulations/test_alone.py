"""What a site would get by itself, beside what the federation gives it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from lepton_fed.clients import site as site_module
from lepton_fed.errors import RunError
from lepton_fed.models.build import build_model, write_vector
from lepton_fed.simulations.alone import compare_with_alone as compare
from lepton_fed.simulations.sequential import simulate
from tests.ledger_entries import charges_in


def compare_with_alone(done, conf):
    """Compare the sites of a finished simulation."""
    folder = done.folder.path / "alone"
    return compare(done.kit, done.outcome.model, done.population, folder, conf)


def test_a_single_site_gains_nothing_and_loses_nothing(load):
    loaded = load("sites.count=1", metrics=["accuracy"])
    done = simulate(loaded)
    (found,) = compare_with_alone(done, loaded.conf)
    assert (found.site, found.rows) == ("site-1", len(done.population[0].training))
    # The ring rounds what the one update adds to the model.
    assert found.alone_own == pytest.approx(found.federated_own, abs=1e-4)
    assert found.alone_own == found.alone_all
    assert found.federated_own == pytest.approx(done.summary.metrics, rel=1e-7)


def test_skewed_sites_gain_on_the_rows_of_others(load):
    skewed = "sites.partition={name: shards, arguments: {per_site: 2}}"
    loaded = load(skewed, "sites.count=5", "rounds.count=8", metrics=["accuracy"])
    done = simulate(loaded)
    compared = compare_with_alone(done, loaded.conf)
    assert [found.site for found in compared] == [rows.name for rows in done.population]
    for found, site in zip(compared, done.summary.sites, strict=True):
        assert found.federated_own == site.metrics
        # Counts of all sites are added in the ring, which rounds the losses to its grid.
        assert found.federated_all == pytest.approx(done.summary.metrics, rel=1e-7)
        assert found.alone_own["accuracy"] > 0.9, "two classes of ten are easy"
        assert found.alone_all["accuracy"] < 0.45
        assert found.federated_all["accuracy"] > found.alone_all["accuracy"] + 0.1


def test_the_federated_metrics_are_those_of_the_final_model(load):
    loaded = load(metrics=["accuracy"])
    done = simulate(loaded)
    compared = compare_with_alone(done, loaded.conf)
    model = build_model(loaded.conf.task, (1, 8, 8), seed=0).eval()
    write_vector(model, done.kit.layout, done.outcome.model)
    for found, rows in zip(compared, done.population, strict=True):
        inputs = torch.from_numpy(rows.held_out.inputs.astype(np.float32)) / 16
        with torch.no_grad():
            outputs = model(inputs)
        targets = torch.from_numpy(rows.held_out.targets)
        hits = (outputs.argmax(dim=1) == targets).float().mean()
        assert found.federated_own["accuracy"] == pytest.approx(float(hits), abs=1e-6)
        loss = float(functional.cross_entropy(outputs, targets))
        assert found.federated_own["loss"] == pytest.approx(loss, rel=1e-4)


def test_training_alone_is_charged_to_a_ledger_of_its_own(load, private):
    loaded = load(*private)
    done = simulate(loaded)
    before = {
        rows.name: (done.folder.site(rows.name) / "ledger.sqlite").read_bytes()
        for rows in done.population
    }
    compare_with_alone(done, loaded.conf)
    for name, content in before.items():
        assert (done.folder.site(name) / "ledger.sqlite").read_bytes() == content
        own = charges_in(done.folder.path / "alone" / name)
        assert [line["round"] for line in own] == [1, 2, 3]
        assert own[0]["run"] == "alone"


def test_alone_there_is_no_sum_to_put_a_whole_site_s_noise_into(load):
    client = ("privacy.client.enabled=true", "privacy.client.noise=coordinator")
    loaded = load(*client, "privacy.client.clip=0.01", metrics=["accuracy"])
    done = simulate(loaded)
    for found in compare_with_alone(done, loaded.conf):
        assert found.alone_own["accuracy"] > 0.8
        assert found.federated_own["accuracy"] < 0.8, "clipped to next to nothing"


def test_a_site_that_cannot_train_alone_is_named(load, monkeypatch):
    loaded = load()
    done = simulate(loaded)

    def failing(*given, **named):
        raise ValueError("a row of 4711")

    monkeypatch.setattr(site_module, "train", failing)
    with pytest.raises(RunError) as caught:
        compare_with_alone(done, loaded.conf)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF5301", "site-1")
    assert "4711" not in str(caught.value)

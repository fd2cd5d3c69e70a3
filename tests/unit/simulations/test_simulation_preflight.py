"""What is checked before a simulation, all at once and without writing anything."""

from __future__ import annotations

import re

from lepton_fed.simulations.preflight import check_simulation


def found(loaded):
    checks = check_simulation(loaded.conf)
    details = {check.name: check.detail for check in checks.checks if not check.problems}
    codes = {check.name: check.problems[0].code for check in checks.checks if check.problems}
    return details, codes, checks.exit_code


def grid_of(details):
    return float(re.search(r"grid ([0-9.e-]+)", details["aggregation"]).group(1))


def test_a_sound_conf_is_described(load, tmp_path):
    details, codes, exit_code = found(load())
    assert (codes, exit_code) == ({}, 0)
    assert details["strategy"] == "fedavg, needs sum"
    assert details["device"] == "cpu"
    assert details["task"].startswith("650 parameters, digest ")
    assert details["data"].startswith("1437 rows over 3 sites (479 to 479 a site), 360 held out")
    assert "64-bit ring" in details["aggregation"]
    assert "privacy" not in details
    assert not (tmp_path / "runs").exists()


def test_privacy_is_described_by_the_noise_it_takes(load, private):
    details, codes, _ = found(load(*private))
    assert codes == {}
    assert details["privacy"].startswith("noise multiplier ")
    assert not {"INSECURE:", "order"} & set(details["privacy"].split())
    record = ("privacy.record.sampler=full", "privacy.record.randomness=insecure_seeded")
    details, _, _ = found(load(*private, *record))
    assert "full order without amplification; INSECURE" in details["privacy"]
    details, _, _ = found(load(*private, record[0], "privacy.record.mechanism=dp_ftrl"))
    assert details["privacy"].endswith(", correlated over steps, full order")


def test_correlated_noise_of_all_sites_fits_into_memory_or_is_refused(load, private, monkeypatch):
    record = ("privacy.record.sampler=full", "privacy.record.mechanism=dp_ftrl")
    one = (load(*private, *record, "privacy.record.band=2"), 650 * 4)
    for sites, code in ((3, {}), (2.9, {"privacy": "LF3352"})):
        memory = int(sites * one[1])
        monkeypatch.setattr(
            "lepton_fed.training.noise.os.sysconf",
            lambda name, memory=memory: memory if name == "SC_PHYS_PAGES" else 1,
        )
        _, codes, _ = found(one[0])
        assert codes == code


def test_client_level_dp_is_described_by_its_noise_and_whom_it_holds_against(load):
    client = ("privacy.client.enabled=true", "privacy.client.noise=coordinator")
    details, codes, _ = found(load(*client))
    assert codes == {}
    said = details["client-level DP"]
    assert said.startswith("epsilon 8 for all rounds; noise multiplier ")
    assert "of a mean of 3 updates of norm 1; holds against the other sites" in said
    assert "quantile" not in said
    details, _, _ = found(load(*client, "privacy.client.quantile=0.8"))
    said = details["client-level DP"]
    assert "updates of norm 1 at first; the norm then follows the 0.8 quantile of theirs" in said
    assert "within it is known to " in said
    masked = ("privacy.client.enabled=true", "privacy.secure_aggregation.enabled=true")
    details, _, _ = found(load(*masked, "privacy.secure_aggregation.bits=20"))
    assert "while 2 sites of a sum add their share" in details["client-level DP"]
    assert grid_of(details) < 1e-3, "made for updates of norm 1, not for the largest that is taken"
    assert "round" not in details["aggregation"]
    details, _, _ = found(load(*masked, "privacy.client.quantile=0.5"))
    assert "in the first round" in details["aggregation"]
    coarse = (*masked, "privacy.client.noise=coordinator", "privacy.secure_aggregation.bits=16")
    _, codes, _ = found(load(*coarse, "privacy.client.quantile=0.5"))
    assert codes == {"aggregation": "LF3401"}
    _, codes, _ = found(load(*masked, "privacy.client.epsilon=1e-9"))
    assert codes == {"client-level DP": "LF3321"}


def test_shared_noise_is_described_with_the_grid_that_leaves_room_for_it(load):
    masked = ("privacy.secure_aggregation.enabled=true", "task.training.steps=1")
    shared = (
        "privacy.record={enabled: true, noise: shared, sampling_rate: 0.5, honest: 2}",
        "task.training.epochs=null", "task.training.momentum=0", "task.training.optimiser=sgd",
        "task.training.batch_size=100", "task.training.learning_rate=50",
        "task.aggregation={weight: equal, norm_bound: 0.001}",
    )  # fmt: skip
    details, codes, _ = found(load(*masked, *shared))
    assert codes == {}
    said = details["shared noise"]
    assert said.startswith("epsilon 8 for all rounds; noise multiplier ")
    assert "while 2 of 3 sites add their share" in said
    bare, _, _ = found(load(*masked, *shared[1:]))
    grids = [float(re.search("grid ([^,]+),", text["aggregation"])[1]) for text in (bare, details)]
    assert grids[1] > 10 * grids[0], "the noise is larger than any update"


def test_what_a_run_would_refuse_of_strategy_and_noise_is_found(load):
    masked = "privacy.secure_aggregation.enabled=true"
    median = ("strategy.name=flower", "strategy.arguments.strategy=FedMedian")
    _, codes, _ = found(load(masked, *median))
    assert codes == {"aggregation": "LF3403"}


def test_several_failures_are_reported_together(load, tmp_path):
    details, codes, exit_code = found(
        load(
            "task.model.arguments={depth: 3}",
            "strategy.arguments={mu: 1}",
            "device=cuda:63",
            "sites.source.path=somewhere",
        )
    )
    assert codes == {
        "task": "LF1023",
        "strategy": "LF1023",
        "device": "LF1102",
        "data": "LF3104",
    }
    assert (details, exit_code) == ({}, 2)
    assert not (tmp_path / "runs").exists()


def test_a_target_that_cannot_be_kept_fails_the_privacy_check_alone(load):
    details, codes, exit_code = found(
        load("privacy.record={enabled: true, epsilon: 1.0e-05}", "rounds.count=2")
    )
    assert codes == {"privacy": "LF3301"}
    assert set(details) == {"task", "strategy", "device", "data", "aggregation"}
    assert exit_code == 2


def test_privacy_is_not_judged_on_a_model_that_does_not_exist(load, private):
    _, codes, _ = found(load(*private, "task.model.arguments={depth: 3}"))
    assert codes == {"task": "LF1023"}


def test_a_ring_without_room_is_found(load):
    _, codes, _ = found(load("task.aggregation.norm_bound=1.0e-300"))
    assert codes == {"aggregation": "LF3401"}

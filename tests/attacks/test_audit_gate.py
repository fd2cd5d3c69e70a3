"""The audit, itself audited: it finds no fault with sound training, and each planted one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner, Result

from lepton_fed.audit.checks import check_bound, check_noise
from lepton_fed.audit.claims import claims_of_run
from lepton_fed.audit.lower_bound import lower_bound
from lepton_fed.audit.mechanism import mechanism_of
from lepton_fed.audit.training import rehearse
from lepton_fed.cli import app
from lepton_fed.clients import encoded
from lepton_fed.clients.site import Site
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.dp.accounting import Event, epsilon_of
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.engine import DpSgd
from lepton_fed.privacy.dp.engines import bookkeeping
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import Integers
from lepton_fed.privacy.dp.shared import SharedNoise
from lepton_fed.privacy.dp.step_noise import IndependentSteps, add_noise
from lepton_fed.privacy.ledger import Ledger
from lepton_fed.privacy.ledger.book import RunAccount, RunName
from lepton_fed.runs.folder import RunFolder
from lepton_fed.simulations.sequential import simulate
from lepton_fed.training.kit import build_kit

pytestmark = pytest.mark.audit

_SPENT: list[float] = []
"""CPU seconds that finding each planted fault took: other work on the machine is not counted."""

CONF = (
    "sites.count=2",
    "sites.names=[east, west]",
    "rounds.count=4",
    "rounds.quorum=1",
    "task.model={name: linear}",
    "task.training.epochs=null",
    "task.training.steps=6",
    "task.training.batch_size=128",
    "privacy.record.epsilon=4",
    "privacy.secure_aggregation.enabled=false",
)


SHARED = (
    "sites.count=4",
    "sites.names=[]",
    "rounds.count=20",
    "rounds.quorum=3",
    "rounds.evaluate=false",
    "task.training.steps=1",
    "task.training.batch_size=90",
    "task.training.momentum=0",
    "privacy.record.noise=shared",
    "privacy.record.sampling_rate=0.25",
    "privacy.record.honest=3",
    "privacy.secure_aggregation.enabled=true",
)


def run_in(folder: Path, *more: str) -> RunFolder:
    words = [*CONF, *more, f"runs={folder / 'runs'}"]
    return simulate(load_values(SimulationConf, template("simulation"), words)).folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_in(tmp_path_factory.mktemp("audited"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_in(tmp_path_factory.mktemp("shared"), *SHARED)


@pytest.fixture(params=["site", "shared"])
def either(request: pytest.FixtureRequest) -> RunFolder:
    """A run whose sites add all of the noise each, and one whose sites share it."""
    run = request.getfixturevalue({"site": "finished"}.get(request.param, request.param))
    assert isinstance(run, RunFolder)
    return run


def audited(run: RunFolder, *words: str) -> Result:
    return CliRunner().invoke(app, ["audit", str(run.path), *words], env={"COLUMNS": "200"})


@contextmanager
def timed() -> Iterator[None]:
    began = time.process_time()
    yield
    _SPENT.append(time.process_time() - began)


def failed(result: Result) -> list[str]:
    assert result.exit_code == 4, result.output
    return [line.split()[0] for line in result.stdout.splitlines() if " FAIL " in line]


def test_a_sound_run_passes_and_its_record_says_so(finished: RunFolder) -> None:
    result = audited(finished, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((finished.path / "audit.json").read_text())
    noise, contribution, bound, accounting = (check["numbers"] for check in report["checks"])
    assert noise["absent"] * report["steps"] > 5000
    assert noise["standard_error"] < 0.01 * noise["configured"]
    assert abs(noise["estimated"] / noise["configured"] - 1) < 0.05
    assert contribution["norm"] <= 1 + 1e-5
    assert contribution["norm"] > 0.999  # records were found that are clipped
    assert 0.2 < bound["proved"] < bound["claimed"]
    # 4 rounds of 6 steps: the whole run was rehearsed, and costs what the run cost.
    assert report["steps"] == 24
    assert accounting["claimed"] == pytest.approx(accounting["ledgers"], rel=0.01)
    shown = CliRunner().invoke(app, ["runs", "show", str(finished.path)])
    assert "audit       passed" in shown.output


@pytest.mark.parametrize(
    "conf",
    [
        ("privacy.record.engine=bookkeeping",),
        ("privacy.record.engine=bookkeeping", "privacy.record.most_records=50"),
        ("privacy.record.sampler=shuffled",),
        ("privacy.record.sampler=full",),
    ],
)
def test_a_sound_run_passes_whatever_its_engine_and_sampler(
    conf: tuple[str, ...], tmp_path: Path
) -> None:
    result = audited(run_in(tmp_path, *conf), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    sampler = conf[0].partition("sampler=")[2] or "poisson"
    adjacency = "add-or-remove-one" if sampler == "poisson" else "zero-out-one"
    assert (report["sampler"], report["adjacency"]) == (sampler, adjacency)
    accounting = report["checks"][3]["numbers"]
    assert accounting["claimed"] == pytest.approx(accounting["ledgers"], rel=0.01)
    assert report["checks"][1]["numbers"]["norm"] > 0.999


def test_a_sound_run_whose_sites_share_the_noise_passes(shared: RunFolder) -> None:
    result = audited(shared, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    noise, contribution, bound, accounting = (check["numbers"] for check in report["checks"])
    assert abs(noise["estimated"] / noise["configured"] - 1) < 0.05
    assert noise["shares"] == 3
    assert 0.95 < noise["least_share"] <= noise["largest_share"] < 1.05
    assert 0.999 < contribution["norm"] <= 1 + 1e-5
    assert 0.9 < contribution["rounded"] <= 1
    assert 0.2 < bound["proved"] < bound["claimed"]
    assert report["steps"] == 20
    assert accounting["claimed"] == pytest.approx(accounting["ledgers"], rel=0.01)


def test_the_engine_that_the_run_names_is_the_one_that_is_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path, "privacy.record.engine=bookkeeping")
    monkeypatch.setattr(bookkeeping, "clip_factors", lambda norms, clip: torch.ones_like(norms))
    result = audited(run)
    assert result.exit_code == 2
    assert "LF3306" in result.output


def test_a_site_s_own_records_of_a_sound_run_pass(finished: RunFolder, tmp_path: Path) -> None:
    run = claims_of_run(finished)
    agreement = replace(run.agreement, run="run-aaaa")
    (tmp_path / "agreements").mkdir()
    kept = tmp_path / "agreements" / f"{agreement.digest}.json"
    kept.write_bytes(canonical_json(agreement))
    ledger = Ledger(
        tmp_path / "ledger.sqlite", dataset="d", content="c", epsilon=50.0, delta=1e-5
    )  # fmt: skip
    name = RunName(agreement.run, agreement.digest)
    for number, event in enumerate(run.sites[0].charged or (), start=1):
        ledger.charge(event, name, number, "task")
    ledger.close()
    conf = tmp_path / "client.yaml"
    conf.write_text(f"kind: client\nname: east\nstate: {tmp_path}\n")
    result = CliRunner().invoke(app, ["audit", "last", "--site", str(conf)])
    assert result.exit_code == 0, result.output
    assert "nothing is claimed" in result.output
    assert list((tmp_path / "audits").glob("*.json"))


def test_half_the_noise_is_found(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = IndependentSteps.__init__

    def faulty(self: IndependentSteps, std: float, entropy: Entropy) -> None:
        sound(self, std / 2, entropy)

    monkeypatch.setattr(IndependentSteps, "__init__", faulty)
    with timed():
        result = audited(finished)
    assert "noise" in failed(result)
    assert "more than 5% off" in result.output
    assert "LF4701" in result.output


def only_the_last_tensor(self: IndependentSteps, sums: Sequence[torch.Tensor]) -> None:
    add_noise(sums[-1], self.std, self.entropy)


def three_quarters_of_each_tensor(self: IndependentSteps, sums: Sequence[torch.Tensor]) -> None:
    for total in sums:
        add_noise(total.view(-1)[: max(1, 3 * total.numel() // 4)], self.std, self.entropy)


def one_noise_for_all_tensors(self: IndependentSteps, sums: Sequence[torch.Tensor]) -> None:
    noise = torch.zeros(max(total.numel() for total in sums))
    add_noise(noise, self.std, self.entropy)
    for total in sums:
        total.add_(noise[: total.numel()].view(total.shape))


class TakenBack:
    """The ninth step of each tensor takes off what the seventh added."""

    def __init__(self) -> None:
        self._seventh: dict[int, torch.Tensor] = {}
        self._steps = 0

    def __call__(self, noise: IndependentSteps, sums: Sequence[torch.Tensor]) -> None:
        self._steps += noise.std > 0
        for at, total in enumerate(sums):
            fresh = torch.zeros_like(total)
            add_noise(fresh, noise.std, noise.entropy)
            if self._steps == 7:
                self._seventh[at] = fresh
            total.add_(-self._seventh[at] if self._steps == 9 else fresh)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (only_the_last_tensor, "tensor 1.weight has 0.00 of it"),
        (three_quarters_of_each_tensor, "tensor 1.weight has 0.8"),
        (one_noise_for_all_tensors, "has noise of the canaries (correlation 1.00)"),
        (TakenBack(), "steps 7 and 9 have a correlation of -1.00"),
    ],
)
def test_noise_that_some_tensors_or_steps_go_without_is_found(
    fault: Any, found: str, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IndependentSteps, "add", lambda self, sums: fault(self, sums))
    with timed():
        result = audited(finished)
    assert failed(result) == ["noise"] or fault is three_quarters_of_each_tensor
    assert found in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ((), "east charged 3 steps for a round of 6"),
        (
            ("privacy.record.mechanism=dp_ftrl", "privacy.record.sampler=full"),
            "east charged 18 steps in 4 rounds of 6",  # of the last, half
        ),
    ],
)
def test_a_run_whose_sites_charged_for_half_of_their_steps_is_found_afterwards(
    conf: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Ledger.charge

    def faulty(self: Ledger, event: Any, *more: Any) -> float:
        return sound(self, replace(event, steps=event.steps // 2), *more)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "charge", faulty)
        run = run_in(tmp_path, *conf)
    result = audited(run)
    assert failed(result) == ["accounting"]
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("large", "code", "exit_code"),
    [
        (5, "LF4702", 4),  # in batches larger than the site's own check before training
        (1, "LF3306", 2),  # in all: the training refuses to begin
    ],
)
def test_one_row_that_is_not_clipped_is_found(
    large: int, code: str, exit_code: int, either: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DpSgd.clipped_sum

    def faulty(self: DpSgd, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        if len(targets) < large:
            return sound(self, inputs, targets)
        rest = sound(self, inputs[:-1], targets[:-1]) if len(targets) > 1 else None
        engine: Any = self._engine
        clip, engine._clip = engine._clip, 1e30
        last = sound(self, inputs[-1:], targets[-1:])
        engine._clip = clip
        return [a + b for a, b in zip(last, rest, strict=True)] if rest else last

    monkeypatch.setattr(DpSgd, "clipped_sum", faulty)
    with timed():
        result = audited(either)
    assert result.exit_code == exit_code
    assert code in result.output
    if exit_code == 4:
        assert "contribution" in failed(result)


def test_an_accountant_that_is_reset_each_round_is_found(
    either: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = len(claims_of_run(either).sites[0].charged or ())

    def newest(self: RunAccount) -> list[Event]:
        return [event for _, event in self.charges[-1:]]

    monkeypatch.setattr(RunAccount, "charged", property(newest))
    with timed():
        result = audited(either)
    assert failed(result) == ["accounting"]
    assert "the audited training claims" in result.output
    assert f"took part in {rounds} rounds and charged 1" in result.output
    assert "LF4704" in result.output


def test_a_run_that_was_made_with_a_reset_accountant_is_found_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newest(self: Site) -> float | None:
        events = self._ledger.of_run(self._agreement.digest) if self._ledger else []
        return epsilon_of(events[-1:], self._agreement.privacy.record.delta)

    with monkeypatch.context() as patched:
        patched.setattr(Site, "epsilon", property(newest))
        run = run_in(tmp_path)
    result = audited(run)
    assert failed(result) == ["accounting"]
    assert "east claims" in result.output
    assert "its ledger gives 3.99" in result.output
    assert "audit       FAILED" in CliRunner().invoke(app, ["runs", "show", str(run.path)]).output


def test_one_site_of_three_that_adds_half_of_its_share_is_found(
    shared: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = count()

    def faulty(std: float, size: int, entropy: Entropy) -> Integers:
        return discrete_gaussian(std / 2 if next(drawn) % 3 == 1 else std, size, entropy)

    monkeypatch.setattr(encoded, "discrete_gaussian", faulty)
    with timed():
        result = audited(shared)
    assert failed(result) == ["noise"]
    assert re.search(r"site 2 adds 0\.(49|50|51) of its share", result.output)
    assert "site 1" not in result.output


def test_shares_that_are_made_for_more_sites_than_are_counted_on_are_found(
    shared: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = SharedNoise.share_std

    def faulty(self: SharedNoise, grid: float) -> float:
        return sound(replace(self, honest=4), grid)

    monkeypatch.setattr(SharedNoise, "share_std", faulty)
    with timed():
        result = audited(shared)
    assert failed(result) == ["noise"]
    assert "more than 5% off" in result.output
    assert re.search(r"site 3 adds 0\.8[5-8] of its share", result.output)


def test_the_same_share_in_every_round_is_found(
    shared: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = count()

    def faulty(std: float, size: int, entropy: Entropy) -> Integers:
        del entropy
        return discrete_gaussian(std, size, Entropy(bytes([next(drawn) % 3] * 32)))

    monkeypatch.setattr(encoded, "discrete_gaussian", faulty)
    with timed():
        result = audited(shared)
    assert "noise" in failed(result)
    assert "they are not independent" in result.output


def test_an_update_that_is_rounded_too_coarsely_is_found(
    shared: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = RingEncoding.encode

    def faulty(
        self: RingEncoding, values: npt.NDArray[np.floating], weight: int
    ) -> tuple[npt.NDArray[np.uint64], int]:
        coarse = 2.0**10 * self.grid
        return sound(self, np.rint(values / coarse) * coarse, weight)

    monkeypatch.setattr(RingEncoding, "encode", faulty)
    with timed():
        result = audited(shared)
    assert "contribution" in failed(result)
    assert "of what is accounted for" in result.output


def test_all_planted_faults_were_found_within_a_minute() -> None:
    assert len(_SPENT) == 15
    assert sum(_SPENT) < 60


def test_the_bound_of_twenty_sound_trainings_is_never_above_epsilon(
    finished: RunFolder, tmp_path: Path
) -> None:
    claims = claims_of_run(finished)
    proved = []
    for seed in range(20):
        kit = build_kit(claims.agreement.task, seed)
        watched = rehearse(
            kit, claims.agreement, mechanism_of(claims), tmp_path / str(seed), canaries=300
        )
        bound = lower_bound(watched.noised.sum(axis=0), watched.included, watched.delta)
        for check in (check_noise(watched), check_bound(bound, watched)):
            assert check.passed, check.found
        proved.append(bound.epsilon)
    assert max(proved) > 0.1  # the guesses do say something

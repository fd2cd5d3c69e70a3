"""Simulations with client-level DP: they learn, say what is protected, or do not start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lepton_fed.cli.simulate import privacy_lines
from lepton_fed.clients.site import Site
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.errors import ConfError, TaskError
from lepton_fed.runs.events import Event, read_events
from lepton_fed.simulations.sequential import Simulation, simulate
from lepton_fed.strategies.base import DELTA

TEN = (
    "privacy.client.enabled=true", "privacy.client.epsilon=50", "privacy.record.enabled=false",
    "task.model.name=linear", "task.model.arguments={}", "task.training.momentum=0",
    "task.training.learning_rate=0.5", "task.metrics=[accuracy]", "rounds.count=6",
    "sites.names=[]", "sites.count=10", "sites.partition.name=iid", "sites.partition.arguments={}",
    "privacy.outside_epsilon=[evaluation]",
)  # fmt: skip
PLAIN = ("privacy.client.noise=coordinator", "privacy.secure_aggregation.enabled=false")
FOLLOWED = (
    "privacy.client.epsilon=100", "rounds.count=24", "rounds.evaluate=false",
    "privacy.outside_epsilon=[]",
)  # fmt: skip
SMALL = ("sites.count=3", "rounds.count=1", "rounds.evaluate=false")


def simulated(folder: Path, *words: str) -> Simulation:
    words = (*TEN, *words, f"runs={folder}")
    return simulate(load_values(SimulationConf, template("simulation"), list(words)))


def events_of(done: Simulation, name: str) -> list[Event]:
    return [event for event in read_events(done.folder.events) if event["event"] == name]


@pytest.mark.parametrize(
    ("words", "against"),
    [
        ((), "while 7 sites of a sum add their share"),
        (
            ("privacy.client.mechanism=skellam", "privacy.secure_aggregation.bits=24"),
            "while 7 sites of a sum add their share",
        ),
        (PLAIN, "not against the coordinator, which reads single updates"),
        (PLAIN[:1], "not against the coordinator, which reads sums without noise"),
    ],
)
def test_ten_sites_learn_under_much_epsilon_and_say_what_it_is_worth(
    tmp_path: Path, words: tuple[str, ...], against: str
) -> None:
    done = simulated(tmp_path, *words)
    summary = done.summary
    assert summary.metrics["accuracy"] > 0.75
    assert not summary.repeatable
    assert summary.outside_epsilon == ["evaluation"]
    assert summary.delta is None
    assert summary.client is not None
    assert 49 < summary.client.epsilon <= 50
    assert summary.client.adjacency == "zero-out-one-site"
    assert against in summary.client.against
    (planned,) = events_of(done, "client_dp.planned")
    assert (planned["cohort"], planned["rounds"]) == (10, 6)
    assert planned["against"] == summary.client.against
    assert planned["epsilon"] == summary.client.epsilon
    assert {event["norm"] for event in events_of(done, "reply.accepted")} == {None}
    assert done.folder.read_summary() == summary
    text = "\n".join(privacy_lines(summary))
    assert against in text
    assert "not covered by epsilon: evaluation" in text
    assert "no single record" in text


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """Have the norms of the updates noted, which no run shows, by round."""
    found: dict[int, list[float]] = {}
    answer = Site.answer

    def noted(self: Site, ask: Ask) -> Reply:
        reply = answer(self, ask)
        if reply.update is not None:
            found.setdefault(ask.round_number, []).append(reply.update.norms[DELTA])
        return reply

    monkeypatch.setattr(Site, "answer", noted)
    return found


@pytest.mark.parametrize(
    ("words", "start"),
    [((), 0.3), (PLAIN[:1], 3.0), (PLAIN, 0.3)],
    ids=["shared", "masked", "plain"],
)
def test_the_norm_of_a_run_follows_the_norms_of_its_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], start: float
) -> None:
    norms = watched(monkeypatch)
    done = simulated(
        tmp_path, *words, *FOLLOWED, f"privacy.client.clip={start}", "privacy.client.quantile=0.5"
    )
    closed = [event["clip"] for event in events_of(done, "round.closed")]
    told = [start, *closed[:-1]]
    medians = [float(np.median(norms[number])) for number in sorted(norms)]
    assert len(told) == len(medians) == 24
    assert start / medians[0] < 0.5 or start / medians[0] > 2
    # The noise on ten sites' count is large, and fresh each time: in one run of a hundred the last
    # norms are off by 1.4.
    ratios = np.array(told[-6:]) / np.array(medians[-6:])
    assert 1 / 1.8 < np.exp(np.mean(np.log(ratios))) < 1.8
    client = done.summary.client
    assert client is not None
    assert (client.clip, client.quantile, client.last_clip) == (start, 0.5, closed[-1])
    (planned,) = events_of(done, "client_dp.planned")
    assert (planned["clip"], planned["quantile"]) == (start, 0.5)
    text = "\n".join(privacy_lines(done.summary))
    assert f"then the 0.5 quantile of the norms: {closed[-1]:.4g} at the end" in text
    assert done.folder.read_summary() == done.summary


def test_both_guarantees_of_one_run_are_told_each_by_itself(tmp_path: Path) -> None:
    words = ("privacy.record.enabled=true", "privacy.record.epsilon=3", "rounds.count=1")
    done = simulated(tmp_path, *words)
    summary = done.summary
    assert (summary.delta, summary.honest) == (1e-5, 0)
    assert {site.epsilon for site in summary.sites} == {3.0}
    assert summary.client is not None
    text = "\n".join(privacy_lines(summary))
    assert "each record: at most epsilon as above at delta 1e-05" in text
    whole = "each site adds the whole noise: it holds against everyone; the mean has "
    assert f"{whole}3.2 times the noise that sites can share" in text
    assert "each site's whole part: epsilon" in text
    assert f"it holds against {summary.client.against}" in text


def test_other_noise_makes_another_model(tmp_path: Path) -> None:
    for words in (SMALL, (*SMALL, *PLAIN)):
        first = simulated(tmp_path / "a", *words)
        second = simulated(tmp_path / "b", *words)
        assert first.summary.model != second.summary.model


def test_without_a_word_for_evaluations_no_counts_leave(tmp_path: Path) -> None:
    done = simulated(tmp_path, *SMALL[:2], "rounds.evaluate=true", "privacy.outside_epsilon=[]")
    assert done.summary.metrics == {}
    assert done.summary.outside_epsilon == []
    assert "nothing that left a site" in "\n".join(privacy_lines(done.summary))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("privacy.secure_aggregation.enabled=false",), "LF1080"),
        (("privacy.client.clip=101",), "LF1080"),
        (("privacy.client.honest=11",), "LF1080"),
        (("privacy.client.quantile=0",), "LF1015"),
        (("privacy.client.quantile=1",), "LF1015"),
        (("privacy.client.mechanism=skellam",), "LF1080"),
        (("task.aggregation.weight=rows", "task.aggregation.weight_bound=500"), "LF1080"),
        ((*PLAIN, "privacy.client.mechanism=skellam"), "LF1080"),
        ((*PLAIN, "strategy.name=flower", "strategy.arguments.strategy=FedMedian"), "LF3340"),
        (("privacy.client.epsilon=1e-9",), "LF3321"),
    ],
)
def test_what_it_does_not_cover_refuses_to_start(
    tmp_path: Path, words: tuple[str, ...], code: str
) -> None:
    with pytest.raises((ConfError, TaskError)) as refused:
        simulated(tmp_path, *words)
    assert refused.value.code == code
    assert not list(tmp_path.iterdir())


def test_optimisers_of_the_coordinator_take_the_noised_mean(tmp_path: Path) -> None:
    words = ("strategy.name=flower", "strategy.arguments.strategy=FedAvgM", *SMALL)
    for noise in ((), PLAIN):
        assert simulated(tmp_path, *words, *noise).summary.client is not None

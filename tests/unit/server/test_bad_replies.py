"""Whatever one site sends costs its own contribution and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lepton_fed.config.schema import Rounds
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.errors import Problem, RunError

Change = Callable[[Reply], list[Reply]]


def with_delta(change: Callable[[np.ndarray[Any, Any]], object]) -> Change:
    def changed(reply: Reply) -> list[Reply]:
        assert reply.update is not None
        vectors = {"delta": change(reply.update.vectors["delta"].copy())}
        return [replace(reply, update=replace(reply.update, vectors=vectors))]

    return changed


def with_update(**fields: Any) -> Change:
    return lambda reply: [replace(reply, update=replace(reply.update, **fields))]  # type: ignore[type-var]


def nan_at_the_end(delta: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    delta[-1] = math.nan
    return delta


def nothing(reply: Reply) -> list[Reply]:
    del reply
    return []


# What the site sends in round 2, and the code under which the log names it.
REFUSED = {
    "a NaN": (with_delta(nan_at_the_end), "LF4405"),
    "an infinity": (with_delta(lambda delta: delta / np.float32(0)), "LF4405"),
    "too large a norm": (with_delta(lambda delta: delta * np.float32(1e4)), "LF4406"),
    "another length": (with_delta(lambda delta: delta[:-1]), "LF4404"),
    "one number for all": (with_delta(lambda delta: delta[:1]), "LF4404"),
    "a column": (with_delta(lambda delta: delta[:, None]), "LF4404"),
    "double precision": (with_delta(lambda delta: delta.astype(np.float64)), "LF4404"),
    "another layout": (with_update(layout="f" * 64), "LF4401"),
    "an extra vector": (with_update(vectors={"delta": 0, "more": 0}), "LF4402"),
    "no vector": (with_update(vectors={}), "LF4402"),
    "a negative weight": (with_update(weight=-1.0), "LF4403"),
    "no weight": (with_update(weight=0.0), "LF4403"),
    "a weight that is NaN": (with_update(weight=math.nan), "LF4403"),
    "a weight beyond its bound": (with_update(weight=2.5), "LF4403"),
    "a weight the ring cannot hold": (with_update(weight=1e-30), "LF4403"),
    "a whole-number weight": (with_update(weight=1), "LF4403"),
    "an epsilon that is NaN": (lambda reply: [replace(reply, epsilon=math.nan)], "LF4412"),
    "an endless noise multiplier": (
        lambda reply: [replace(reply, noise_multiplier=math.inf)],
        "LF4412",
    ),
    "no update": (lambda reply: [replace(reply, update=None)], "LF4409"),
    "a refusal": (
        lambda reply: [Reply(reply.site, refusal=Problem("LF4205", "refused by the site"))],
        "LF4205",
    ),
    "a refusal beside an update": (
        lambda reply: [replace(reply, refusal=Problem("LF4205", "refused by the site"))],
        "LF4205",
    ),
}


def in_round_two(honest: Callable[[Ask], list[Reply]], change: Change) -> Any:
    def answer(ask: Ask) -> list[Reply]:
        replies = honest(ask)
        return change(replies[0]) if ask.train and ask.round_number == 2 else replies

    return answer


@pytest.fixture
def run(world: Any) -> Callable[[Change], Any]:
    """Run with site b changed in round 2."""
    return lambda change: world.run(world.transport(b=in_round_two(world.honest("b"), change)))


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_reply_costs_its_own_contribution_and_is_named(
    world: Any, run: Any, name: str
) -> None:
    change, code = REFUSED[name]
    silent = run(nothing)
    found = run(change)
    assert found.model.tobytes() == silent.model.tobytes()
    assert found.digest == silent.digest
    assert found.metrics == silent.metrics
    (event,) = world.events("reply.refused", "counts.refused")
    assert (event["event"], event["round"], event["site"]) == ("reply.refused", 2, "b")
    assert event["code"] == code
    assert event["why"]
    closed = world.events("round.closed")
    assert [each["sites"] for each in closed] == [list("abcd"), list("acd"), list("abcd")]
    assert {site: record.rounds for site, record in found.record.sites.items()} == {
        "a": 3,
        "b": 2,
        "c": 3,
        "d": 3,
    }


def test_a_bad_reply_does_not_touch_what_is_known_of_its_site(world: Any, run: Any) -> None:
    change, _ = REFUSED["a NaN"]
    found = run(
        lambda reply: [replace(each, sent_bytes=10**9, epsilon=5.0) for each in change(reply)]
    )
    assert found.record.sites["b"].update_bytes == 32
    assert found.record.sites["b"].epsilon is None
    (event,) = world.events("reply.refused")
    assert "epsilon" not in event


def broken_counts(reply: Reply) -> list[Reply]:
    assert reply.counts is not None
    counts = reply.counts.copy()
    counts[2] += 1
    return [replace(reply, counts=counts)]


@pytest.mark.parametrize(
    "change",
    [
        broken_counts,
        lambda reply: [replace(reply, counts=reply.counts[:-1])],
        lambda reply: [replace(reply, counts=reply.counts * np.nan)],
        lambda reply: [replace(reply, counts=reply.counts.astype(np.float32))],
        lambda reply: [replace(reply, counts=reply.counts * 2.0**40)],
    ],
    ids=["do not add up", "too few", "NaN", "single precision", "too large"],
)
def test_bad_counts_cost_the_counts_and_not_the_update(
    world: Any, run: Any, change: Change
) -> None:
    without = run(lambda reply: [replace(reply, counts=None)])
    table = (world.folder.path / "metrics.csv").read_text()
    found = run(change)
    assert found.digest == without.digest
    assert (world.folder.path / "metrics.csv").read_text() == table
    (event,) = world.events("reply.refused", "counts.refused")
    assert (event["event"], event["round"], event["site"], event["code"]) == (
        "counts.refused",
        2,
        "b",
        "LF4408",
    )


def test_a_second_reply_is_refused_and_the_first_stays(world: Any, run: Any) -> None:
    honest = run(lambda reply: [reply])
    found = run(lambda reply: [reply, *with_delta(lambda delta: -delta)(reply)])
    assert found.model.tobytes() == honest.model.tobytes()
    assert found.digest == honest.digest
    (event,) = world.events("reply.refused")
    assert (event["site"], event["round"], event["code"]) == ("b", 2, "LF4410")


@pytest.mark.parametrize("stranger", ["eve", "\x1b[2J"])
def test_a_reply_from_a_stranger_is_refused(world: Any, run: Any, stranger: str) -> None:
    honest = run(lambda reply: [reply])
    found = run(lambda reply: [replace(reply, site=stranger), reply])
    assert found.digest == honest.digest
    assert sorted(found.record.sites) == list("abcd")
    (event,) = world.events("reply.refused")
    assert (event["site"], event["code"]) == (stranger, "LF4407")


def test_a_reply_from_a_site_outside_the_cohort_is_refused(world: Any) -> None:
    """All four sites are of the run, two are asked, and all four reply."""
    rounds = Rounds(count=2, fraction=0.5)
    honest = world.run(world.transport(), rounds)

    eager = world.transport()

    def all_reply(asks: Any, deadline: Any = None) -> Any:
        ask = next(iter(asks.values()))
        for site in "dcba":
            yield from eager.answers[site](ask)

    eager.exchange = all_reply
    found = world.run(eager, rounds)
    assert found.digest == honest.digest
    asked = {event["round"]: event["cohort"] for event in world.events("round.started")}
    refused = {(event["round"], event["site"]) for event in world.events("reply.refused")}
    assert refused == {(r, site) for r in (1, 2) for site in "abcd" if site not in asked[r]}
    assert len(refused) == 4


def test_the_last_evaluation_names_strangers_second_replies_and_bad_counts(world: Any) -> None:
    honest = world.run(world.transport())

    def at_the_end(site: str, change: Change) -> Any:
        answer = world.honest(site)
        return lambda ask: answer(ask) if ask.train else change(answer(ask)[0])

    found = world.run(
        world.transport(
            a=at_the_end("a", lambda reply: [reply, reply]),
            b=at_the_end("b", lambda reply: [replace(reply, site="eve"), reply]),
            c=at_the_end("c", broken_counts),
            d=at_the_end("d", lambda reply: [Reply("d", refusal=Problem("LF5301", "failed"))]),
        )
    )
    assert found.digest == honest.digest
    assert found.record.sites["a"].metrics == honest.record.sites["a"].metrics
    assert found.record.sites["b"].metrics == honest.record.sites["b"].metrics
    events = world.events("reply.refused", "counts.refused")
    assert [(event["site"], event["code"]) for event in events] == [
        ("a", "LF4410"),
        ("eve", "LF4407"),
        ("c", "LF4408"),
        ("d", "LF5301"),
    ]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_all_bad_replies_together_leave_the_one_good_site(world: Any) -> None:
    changes = [change for change, _ in REFUSED.values()]

    def storm(ask: Ask) -> list[Reply]:
        (honest,) = world.honest("b")(ask)
        return [bad for change in changes for bad in change(honest)] if ask.train else [honest]

    others = {site: (lambda ask: []) for site in "cd"}
    alone = world.run(world.transport(b=lambda ask: [], **others))
    found = world.run(world.transport(b=storm, **others))
    assert found.digest == alone.digest
    assert len(world.events("reply.refused")) == 3 * len(changes)


def test_a_run_in_which_every_reply_is_refused_says_so(world: Any) -> None:
    def refuses(site: str) -> Any:
        return lambda ask: [Reply(site, refusal=Problem("LF4205", "refused by the site"))]

    with pytest.raises(RunError) as caught:
        world.run(world.transport(**{site: refuses(site) for site in "abcd"}))
    assert caught.value.code == "LF5002"
    assert caught.value.problems[0].where == str(world.folder.events)
    assert len(world.events("reply.refused")) == 12

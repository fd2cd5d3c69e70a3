"""A coordinator waits as long as the pace of its sites says, and for nobody who left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lepton_fed.config.schema import Rounds
from lepton_fed.core.exchange import Reply
from lepton_fed.core.pace import Pace
from lepton_fed.errors import Problem


def watched(world: Any) -> tuple[Any, list[Any]]:
    """A transport that keeps the deadlines it was given."""
    transport, deadlines = world.transport(), []
    exchange = transport.exchange

    def keep(asks: Any, deadline: Any = None) -> Any:
        deadlines.append(deadline)
        return exchange(asks, deadline)

    transport.exchange = keep
    return transport, deadlines


def test_without_a_pace_every_site_is_waited_for(world: Any) -> None:
    transport, deadlines = watched(world)
    world.run(transport)
    assert set(deadlines) == {None}


def test_the_first_round_is_blind_and_later_ones_follow_what_was_measured(world: Any) -> None:
    transport, deadlines = watched(world)
    world.run(transport, pace=Pace(3.0))
    assert deadlines[0].expected_s is None
    assert all(deadline.expected_s is not None for deadline in deadlines[1:])
    assert {deadline.asked for deadline in deadlines} == {4}
    assert {deadline.transfer_s > 0 for deadline in deadlines} == {True}


def test_a_late_reply_is_written_down_and_changes_nothing(world: Any) -> None:
    honest = world.run(world.transport(), pace=Pace(3.0))
    transport = world.transport()
    late = iter([[], [SimpleNamespace(site="c", round_number=1)]])
    transport.take_late = lambda: next(late, [])
    found = world.run(transport, pace=Pace(3.0))
    (event,) = world.events("reply.late")
    assert (event["round"], event["site"], event["asked_in_round"]) == (2, "c", 1)
    assert found.digest == honest.digest


def test_a_site_that_gives_no_reply_costs_its_own_contribution_only(world: Any) -> None:
    transport = world.transport()
    transport.answers["b"] = lambda ask: [
        Reply("b", refusal=Problem("LF5306", "no reply in time", where="b"))
    ]
    world.run(transport, pace=Pace(3.0))
    closed = [event["sites"] for event in world.events("round.closed")]
    assert closed == [["a", "c", "d"]] * 3
    assert {e["site"] for e in world.events("reply.refused")} == {"b"}


def test_sites_that_leave_are_not_asked_and_those_that_come_are(world: Any) -> None:
    transport = world.transport()
    online = iter([["a", "b", "c"], ["a", "c"], ["a", "c", "d"]])
    transport.sites = lambda: next(online, ["a", "c", "d"])
    outcome = world.run(transport, Rounds(count=3, quorum=2))
    assert [event["cohort"] for event in world.events("round.started")] == [
        ["a", "b", "c"], ["a", "c"], ["a", "c", "d"]
    ]  # fmt: skip
    assert {name: site.rounds for name, site in outcome.record.sites.items()} == {
        "a": 3, "b": 1, "c": 3, "d": 1
    }  # fmt: skip


def test_a_round_without_any_site_leaves_the_model_as_it_is(world: Any) -> None:
    transport = world.transport()
    online = iter([["a", "b"], [], ["a", "b"]])
    transport.sites = lambda: next(online, ["a", "b"])
    world.run(transport)
    (event,) = world.events("round.below_quorum")
    assert (event["round"], event["usable"]) == (2, 0)

"""A run whose updates cannot be added as it wants them to be does not begin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ClientPrivacy, Privacy, SecureAggregation, StrategyConf
from lepton_fed.core.task import Aggregation
from lepton_fed.errors import TaskError
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.server.intake import plan_aggregation, shape_of
from lepton_fed.strategies.base import DELTA, Needs, PlainSite, Stateless, Strategy
from lepton_fed.strategies.fedavg import fedavg


@dataclass(frozen=True)
class Robust(Stateless):
    """A server rule that compares single updates; it is not run here."""

    needs: Needs = "each"

    def step(self, state: Any, model: Any, aggregate: Any) -> Any:
        raise NotImplementedError


MEDIAN = Strategy("median", PlainSite(), Robust())


def plan(
    world: Any,
    strategy: Strategy,
    cohort: int,
    sites: int = 0,
    task: Any = None,
    client: ClientPrivacy | None = None,
    **secure: Any,
) -> None:
    masked = SecureAggregation(**{"enabled": True, **secure})
    privacy = Privacy(secure_aggregation=masked, client=client or ClientPrivacy())
    task = task or world.task
    agreement = Agreement("run", task, StrategyConf(strategy.name), 3, 1, privacy, cohort)
    agreement = with_client_noise(agreement, world.layout.size)
    plan_aggregation(agreement, strategy, world.layout, world.plan, sites or cohort)


def refused(*arguments: Any, **named: Any) -> Any:
    with pytest.raises(TaskError) as error:
        plan(*arguments, **named)
    (problem,) = error.value.problems
    return problem


def test_runs_whose_updates_can_be_added_begin(world: Any) -> None:
    for cohort in (3, 4, 200):
        plan(world, fedavg(), cohort)
    plan(world, fedavg(), 24, groups=3)
    plan(world, MEDIAN, 24, groups=3)
    plan(world, fedavg(), 4, bits=20)
    plan(world, MEDIAN, 1, enabled=False)
    plan(world, fedavg(), 1, enabled=False)


def test_a_strategy_that_compares_single_updates_does_not_go_with_one_sum(world: Any) -> None:
    problem = refused(world, MEDIAN, 24)
    assert (problem.code, problem.key) == ("LF3403", "strategy.name")
    assert "'median' compares the updates of single sites" in problem.what
    assert "groups" in problem.remedy


@pytest.mark.parametrize(
    ("cohort", "secure", "needed"),
    [(2, {}, 3), (4, {"min_cohort": 5}, 5), (23, {"groups": 3}, 24),
     (29, {"groups": 3, "min_cohort": 10}, 30), (0, {}, 3)],
)  # fmt: skip
def test_fewer_sites_than_a_sum_needs_are_refused(
    world: Any, cohort: int, secure: dict[str, Any], needed: int
) -> None:
    problem = refused(world, fedavg(), cohort, sites=40, **secure)
    assert problem.code == "LF3404"
    assert f"{cohort} of 40 sites" in problem.what
    assert f"{needed} are needed" in problem.what
    plan(world, fedavg(), needed, **secure)


def test_a_ring_without_room_is_refused_with_what_helps(world: Any) -> None:
    problem = refused(world, fedavg(), 200, bits=16)
    assert problem.code == "LF3401"
    assert "privacy.secure_aggregation.bits" in problem.remedy
    plan(world, fedavg(), 60, bits=16)
    wide = replace(world.task, aggregation=Aggregation("rows", 20.0, 1e300))
    assert refused(world, fedavg(), 3, task=wide).code == "LF3401"
    assert refused(world, fedavg(), 3, task=wide, enabled=False).code == "LF3401"


def test_the_shape_is_that_of_an_update(world: Any) -> None:
    shape = shape_of(fedavg(), world.layout, world.plan)
    assert (shape.layout, shape.vectors) == (world.layout.digest, (DELTA,))
    assert (shape.size, shape.counts) == (world.layout.size, world.plan.size)


@pytest.mark.parametrize("noise", ["shared", "coordinator"])
def test_client_level_dp_covers_the_sum_of_one_vector(world: Any, noise: Any) -> None:
    client = ClientPrivacy(enabled=True, noise=noise)
    equal = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    two = Strategy("two", PlainSite((DELTA, "control")), fedavg().server)
    plan(world, fedavg(), 10, task=equal, client=client)
    for strategy in (two, MEDIAN):
        problem = refused(world, strategy, 10, task=equal, client=client)
        assert (problem.code, problem.key) == ("LF3340", "strategy.name")


def test_of_plain_sums_client_level_dp_refuses_single_updates_too(world: Any) -> None:
    client = ClientPrivacy(enabled=True, noise="coordinator")
    equal = replace(world.task, aggregation=Aggregation(norm_bound=100.0))
    plan(world, fedavg(), 1, task=equal, client=client, enabled=False)
    assert refused(world, MEDIAN, 1, task=equal, client=client, enabled=False).code == "LF3340"

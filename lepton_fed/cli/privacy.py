"""`lepton-fed privacy`: what a target epsilon takes, before anybody agrees to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, print_table, stdout

if TYPE_CHECKING:
    from lepton_fed.config.schema import ServerConf, SimulationConf
    from lepton_fed.privacy.dp.planning import NoisePlan

app = typer.Typer(help="Plan record-level differential privacy before a run.", no_args_is_help=True)

_BAR = 40  # widest bar of the curve


@app.command("plan")
def plan(
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            min=1,
            help="Rows that a site trains on; those of a simulation's smallest site if left out.",
        ),
    ] = None,
    overrides: Overrides = None,
    conf: Annotated[
        Path, typer.Option("--conf", help="A simulation's or coordinator's conf; need not exist.")
    ] = Path("conf/simulation.yaml"),
    as_json: AsJson = False,
) -> None:
    """Print the noise that a target epsilon takes, its cost by round, and schedules with less.

    Keys that matter: privacy.record.epsilon, .delta and .sampler, rounds.count,
    task.training.batch_size, and task.training.epochs or .steps.
    """
    with guarded(as_json=as_json):
        from lepton_fed.config.load import kind_of, load_conf, load_values
        from lepton_fed.config.schema import KINDS, ClientConf
        from lepton_fed.config.templates import template
        from lepton_fed.errors import ConfError, Problem

        there = conf.exists()
        kind = kind_of(conf) if there else "simulation"
        loaded = (
            load_conf(conf, overrides or [], kind=KINDS[kind])
            if there
            else load_values(KINDS[kind], template(kind), overrides or [])
        )
        if isinstance(loaded.conf, ClientConf):
            raise ConfError(
                Problem("LF1211", "a client's conf says nothing of a run's rounds and batches",
                        where=str(conf), remedy="give the coordinator's: --conf conf/server.yaml")
            )  # fmt: skip
    with guarded(as_json=as_json, loaded=loaded):
        rows = _smallest(loaded.conf) if rows is None else rows
        found = _plan(loaded.conf, rows)
        if as_json:
            print_json(found)
        else:
            _show(found)


def _smallest(conf: SimulationConf | ServerConf) -> int:
    """Return the rows of the site that needs the most noise."""
    from lepton_fed.config.schema import SimulationConf
    from lepton_fed.errors import ConfError, Problem

    if not isinstance(conf, SimulationConf):
        raise ConfError(
            Problem("LF1212", "nothing says how many rows a site trains on", where="command line",
                    remedy="--rows 1000; a site's owner knows")
        )  # fmt: skip
    from lepton_fed.simulations.population import populate

    return min(len(site.training) for site in populate(conf))


def _plan(conf: SimulationConf | ServerConf, rows: int) -> dict[str, Any]:
    from lepton_fed.privacy.dp.accounting import guarantee_of
    from lepton_fed.privacy.dp.planning import (
        better_plans,
        epsilon_curve,
        fixed_order,
        plan_for,
        steps_a_round,
    )
    from lepton_fed.privacy.dp.sampling import Sampler, sampler_of

    record, training, rounds = conf.privacy.record, conf.task.training, conf.rounds.count
    sampler: Sampler = sampler_of(record.sampler, rows, training.batch_size)
    size = 0
    if record.mechanism == "dp_ftrl":
        from lepton_fed.training.kit import build_kit

        size = build_kit(conf.task, conf.seed).noised_size
        sampler = fixed_order(
            rows, training.batch_size, training.epochs, training.steps, rounds,
            size=size, band=record.band,
        )  # fmt: skip
    steps = steps_a_round(sampler, training.epochs, training.steps)
    target = {"epsilon": record.epsilon, "delta": record.delta}
    chosen = plan_for(sampler, steps, rounds, **target)
    curve = epsilon_curve(chosen, rounds, record.delta)
    return {
        "rows": rows,
        "rounds": rounds,
        "target": target,
        "schedule": _schedule(chosen, rounds),
        "correlation": _correlation(chosen, size),
        "guarantee": guarantee_of([chosen.round_event.times(rounds)], record.delta),
        "curve": [{"round": number, "epsilon": epsilon} for number, epsilon in curve],
        "better": [_schedule(other, rounds) for other in better_plans(chosen, rounds, **target)],
    }


def _correlation(plan: NoisePlan, size: int) -> dict[str, Any] | None:
    """Return what correlated noise is like, in units of the clipping norm; None for fresh noise."""
    from lepton_fed.privacy.factorisation.mechanism import FixedOrder

    if not isinstance(plan.sampler, FixedOrder):
        return None
    mechanism, noise = plan.sampler.mechanism, plan.noise_multiplier
    return {
        "band": mechanism.band,
        "participations": mechanism.participations,
        "separation": mechanism.separation,
        "state_bytes": 4 * size * (mechanism.band - 1),
        "step_deviation": noise * mechanism.step_deviation,
        "prefix_error": noise * mechanism.error,
        "independent_prefix_error": noise * mechanism.independent_error,
    }


def _schedule(plan: NoisePlan, rounds: int) -> dict[str, Any]:
    """Return a schedule in plain numbers; docs/reference/cli.md says what they mean."""
    return {
        "mechanism": plan.round_event.mechanism,
        "sampler": plan.round_event.sampler,
        "batch_size": plan.sampler.expected_batch,
        "sampling_rate": plan.sampler.rate,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "rows_a_round": plan.rows_a_round,
        "step_noise_to_signal": plan.step_noise,
        "run_noise_to_signal": plan.run_noise(rounds),
    }


def _show(found: dict[str, Any]) -> None:
    out = stdout()
    target, guarantee, rounds = found["target"], found["guarantee"], found["rounds"]
    lines = {
        "site": f"{found['rows']:,} rows, {rounds} rounds",
        "target": f"epsilon {target['epsilon']:g} at delta {target['delta']:g}",
        "cost": f"epsilon {_up(guarantee.epsilon)}, {guarantee.adjacency} (PLD, grid "
        f"{guarantee.grid:g}); replace-one {_up(guarantee.replace_one)}; by Rényi DP "
        f"{_up(guarantee.rdp)}",
    }
    if found["correlation"] is not None:
        lines |= _correlation_lines(found["correlation"])
    for name, text in lines.items():
        out.print(f"{name:<9}{text}", markup=False)
    columns = ["schedule", "sampler", "batch", "rate", "steps", "noise", "step", "run", "work"]
    work = found["schedule"]["rows_a_round"]
    shown = [("as it is", found["schedule"]), *(("better", other) for other in found["better"])]
    print_table(
        "noise multiplier, noise over signal of a step and of the run, and rows to compute",
        columns,
        [
            [
                name,
                schedule["sampler"],
                f"{schedule['batch_size']:,}",
                f"{schedule['sampling_rate']:.3g}",
                f"{schedule['steps']:,}",
                f"{schedule['noise_multiplier']:.3g}",
                f"{schedule['step_noise_to_signal']:.2g}",
                f"{schedule['run_noise_to_signal']:.2g}",
                f"x{schedule['rows_a_round'] / work:.1f}",
            ]
            for name, schedule in shown
        ],
        words=2,
    )
    width = len(str(rounds))
    largest = max(point["epsilon"] for point in found["curve"])
    for point in found["curve"]:
        bar = "#" * max(1, round(_BAR * point["epsilon"] / largest))
        out.print(f"round {point['round']:>{width}}  {_up(point['epsilon']):>7}  {bar}")
    if found["correlation"] is not None:
        return
    if not found["better"]:
        out.print("\nno larger batches and more steps lose less to the noise")
        return
    best = found["better"][0]
    out.print(
        f"\nnext: task.training.batch_size={best['batch_size']} task.training.epochs=null "
        f"task.training.steps={best['steps']} privacy.record.sampler={best['sampler']}",
        markup=False,
    )


def _correlation_lines(correlation: dict[str, Any]) -> dict[str, str]:
    """Return what the noise of the steps is, and what it is better than."""
    from lepton_fed.cli.screen import size

    fresh, error = correlation["independent_prefix_error"], correlation["prefix_error"]
    return {
        "noise": f"correlated over {correlation['band']} steps; of a step up to "
        f"{correlation['step_deviation']:.3g} times the clipping norm",
        "sums": f"of steps are off by {error:.3g} times the clipping norm; by {fresh:.3g} with "
        f"fresh noise at the same epsilon, {fresh / error:.1f} times as much",
        "state": f"{size(correlation['state_bytes'])} of past noise at the site: secret",
    }


def _up(epsilon: float) -> str:
    """Return an epsilon with three decimals, rounded up."""
    from lepton_fed.export.markdown import upper_figure

    return upper_figure(epsilon)

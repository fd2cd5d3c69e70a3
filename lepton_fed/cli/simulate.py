"""`lepton-fed simulate`: a federation in one process."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    guarded,
    number,
    print_json,
    print_table,
    size,
    stdout,
)

if TYPE_CHECKING:
    from lepton_fed.runs.summary import ClientGuarantee, RunSummary


def simulate(
    conf: Annotated[Path, typer.Option("--conf", help="The conf file.")] = Path(
        "conf/simulation.yaml"
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a federation in this process: coordinator and sites, one after another."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import SimulationConf

        loaded = load_conf(conf, overrides or [], kind=SimulationConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.runs.progress import view_for
        from lepton_fed.simulations.sequential import simulate as run

        with view_for(sys.stderr) as view:
            done = run(loaded, listeners=(view,))
        if as_json:
            print_json(done.summary)
            return
        show_summary(done.summary)
        out = stdout()
        out.print(f"record      {done.folder.path}", markup=False)
        out.print(f"\nnext: lepton-fed export {done.folder.path}", markup=False)


def show_summary(summary: RunSummary) -> None:
    """Print what a run has to say: a table of sites, and the lines that identify it."""
    names = list(summary.metrics)
    rows = [
        [
            site.name,
            f"{site.rounds}/{summary.rounds}",
            *(number(site.metrics, name) for name in names),
            "-" if site.epsilon is None else f"{site.epsilon:.2f}",
            size(site.update_bytes),
        ]
        for site in summary.sites
    ]
    everyone = ["all", "", *(number(summary.metrics, name) for name in names), "", ""]
    columns = ["site", "rounds", *names, "epsilon", "update"]
    print_table(
        f"{summary.strategy}, {summary.parameters:,} parameters", columns, [*rows, everyone]
    )
    out = stdout()
    for name, bound in summary.error_bounds.items():
        out.print(f"{name} is exact to {bound:.2g} (score histograms)")
    for line in privacy_lines(summary):
        out.print(line)
    promise = "" if summary.repeatable else "  (another run prints another one)"
    out.print(f"run digest  {summary.digest}{promise}")


_MECHANISMS = {
    "poisson": "add or remove one record, Poisson sampling",
    "shuffled": "zero out one record, shuffled order without amplification",
    "full": "zero out one record, order of the rows without amplification",
    "dp_ftrl": "zero out one record, DP-FTRL: order of the rows, noise correlated over steps",
}


def privacy_lines(summary: RunSummary) -> list[str]:
    """Return what a run protects and what it does not, as lines."""
    masked = ["            updates are masked: the coordinator read their sums alone"]
    lines = masked if summary.masked else []
    uncovered = ", ".join(f"{what} (counts on held-out rows)" for what in summary.outside_epsilon)
    if summary.client is not None:
        lines = [*_client_lines(summary.client), *lines]
        if summary.delta is None:
            return [
                "privacy     no single record: gradients are not noised",
                *lines,
                f"            not covered by epsilon: {uncovered or 'nothing that left a site'}",
            ]
    if summary.delta is None:
        return ["privacy     none: updates are not noised", *lines]
    how = "at most epsilon as above" if summary.masked else "epsilon as above"
    if summary.honest:
        from_whom = (
            "            each site adds a share of one noise: it holds against the coordinator "
            f"while {summary.honest} sites of a sum add theirs"
        )
    else:
        from_whom = (
            f"            each site adds the whole noise: it holds against everyone{_cost(summary)}"
        )
    insecure = [
        "            INSECURE: noise and batches came from the run's seed; whoever knows it takes "
        "the noise off, and epsilon holds for nobody"
    ]
    mechanism = summary.sampler if summary.mechanism != "dp_ftrl" else summary.mechanism
    return [
        f"privacy     each record: {how} at delta {summary.delta:g} "
        f"({_MECHANISMS.get(mechanism, _MECHANISMS['poisson'])}, PLD)",
        *(insecure if summary.randomness == "insecure_seeded" else []),
        f"            not covered by epsilon: {uncovered or 'nothing that left a site'}; "
        "row counts are public",
        from_whom,
        *lines,
    ]


def _cost(summary: RunSummary) -> str:
    """Return what it costs that each site adds all of the noise."""
    if not summary.rounds:
        return ""
    sites = sum(site.rounds for site in summary.sites) / summary.rounds
    if sites < 2:
        return ""
    return f"; the mean has {math.sqrt(sites):.1f} times the noise that sites can share"


_NOISES = {
    ("shared", "discrete_gaussian"): "shares of discrete Gaussian noise",
    ("shared", "skellam"): "shares of Skellam noise, Rényi DP",
    ("coordinator", "discrete_gaussian"): "discrete Gaussian noise",
}


def _client_lines(client: ClientGuarantee) -> list[str]:
    """Return what client-level DP protects, and from whom."""
    how = _NOISES.get((client.noise, client.mechanism), client.mechanism)
    epsilon = math.ceil(1000 * client.epsilon) / 1000
    return [
        f"            each site's whole part: epsilon {epsilon:g} at "
        f"delta {client.delta:g} for all rounds (zero out one site, {how}, multiplier "
        f"{client.noise_multiplier:.4g}, clip {client.clip:g}{_moved(client)})",
        f"            it holds against {client.against}",
    ]


def _moved(client: ClientGuarantee) -> str:
    """Return where the norm came to; empty where it stayed."""
    if client.quantile is None or client.last_clip is None:
        return ""
    return (
        f", then the {client.quantile:g} quantile of the norms: {client.last_clip:.4g} at the end"
    )

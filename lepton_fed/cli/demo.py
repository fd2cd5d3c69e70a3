"""`lepton-fed demo`: the main job from end to end, offline, on built-in data."""

from __future__ import annotations

import logging
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
from lepton_fed.cli.simulate import privacy_lines

if TYPE_CHECKING:
    from lepton_fed.simulations.demo import Demo


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train digits over three sites with DP, export, sign, verify and use the model."""
    with guarded(as_json=as_json):
        from lepton_fed.simulations.demo import demo_conf, run_demo

        loaded = demo_conf(folder, overrides or [])
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.runs.progress import view_for

        log = logging.getLogger("lepton_fed.demo")

        folder.mkdir(parents=True, exist_ok=True)
        with view_for(sys.stderr) as view:
            done = run_demo(loaded, folder, (view,), log.info)
        if as_json:
            print_json(_as_dict(done))
        else:
            _show(done, folder)


def _show(demo: Demo, folder: Path) -> None:
    from lepton_fed.simulations.demo import REPEATED_ROUNDS

    summary = demo.done.summary
    by_name = {site.name: site for site in summary.sites}
    rows = []
    for each in demo.comparison:
        site = by_name[each.site]
        rows.append(
            [
                each.site,
                str(each.rows),
                f"{number(each.alone_own, 'accuracy')} -> {number(each.federated_own, 'accuracy')}",
                f"{number(each.alone_all, 'accuracy')} -> {number(each.federated_all, 'accuracy')}",
                "-" if site.epsilon is None else f"{site.epsilon:.2f}",
                size(site.update_bytes),
            ]
        )
    print_table(
        "accuracy, alone -> federated",
        ["site", "rows", "own held-out rows", "all sites' held-out rows", "epsilon", "update"],
        rows,
    )
    out = stdout()
    first, second = demo.digests
    same = "equal" if first == second else "DIFFERENT"
    release = demo.report.bundle.manifest
    public = folder / "keys" / "coordinator.pub"
    for line in (
        *privacy_lines(summary),
        f"bundle      {release.task[:12]} version {release.version}, signed {demo.report.signer}",
        f"tampered    refused: {demo.refusal}",
        f"predicted   {demo.predicted}, {demo.correct:.3f} right",
        f"run digest  {summary.digest}",
        f"without DP  {first}  (two runs of {REPEATED_ROUNDS} rounds: {same})",
        "",
        f"next: lepton-fed predict --bundle {demo.report.bundle.folder} --key {public} \\",
        f"        --input {folder / 'new-digits.npz'}",
        "      lepton-fed init my-project",
    ):
        out.print(line, markup=False)


def _as_dict(demo: Demo) -> dict[str, object]:
    return {
        "summary": demo.done.summary,
        "comparison": demo.comparison,
        "bundle": str(demo.report.bundle.folder),
        "tampered": demo.refusal,
        "correct": demo.correct,
        "digests_without_dp": list(demo.digests),
    }

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

    summary = demo.summary
    by_name = {site.name: site for site in summary.sites}
    rows = []
    for each in demo.comparison:
        site, now = by_name[each.site], demo.sites[each.site]
        rows.append(
            [
                each.site,
                str(each.rows),
                f"{number(each.alone_own, 'accuracy')} -> {number(each.federated_own, 'accuracy')}",
                f"{number(each.alone_all, 'accuracy')} -> {number(each.federated_all, 'accuracy')}",
                "-" if site.epsilon is None else f"{site.epsilon:.2f}",
                size(now.bytes_sent),
                f"version {now.version}",
            ]
        )
    print_table(
        "accuracy, alone -> federated",
        ["site", "rows", "own held-out", "all held-out", "epsilon", "sent", "in use"],
        rows,
        narrow=True,
    )
    out = stdout()
    first, second = demo.digests
    same = "equal" if first == second else "DIFFERENT"
    release = demo.report.bundle.manifest
    correct = ", ".join(f"{name} {at.correct:.3f}" for name, at in demo.sites.items())
    for line in (
        *privacy_lines(summary),
        f"bundle      {release.task[:12]} version {release.version}, signed {demo.report.signer}",
        f"tampered    refused: {demo.refusal}",
        f"predicted   {demo.predicted}; right at {correct}",
        f"run digest  {summary.digest}",
        f"without DP  {first}  (two simulations of {REPEATED_ROUNDS} rounds: {same})",
        "",
        f"next: lepton-fed receipts --conf {folder / 'conf' / 'north.yaml'}",
        f"      lepton-fed predict --conf {folder / 'conf' / 'north.yaml'} "
        f"--input {folder / 'new-digits.npz'}",
        "      lepton-fed init my-project",
    ):
        out.print(line, markup=False)


def _as_dict(demo: Demo) -> dict[str, object]:
    return {
        "summary": demo.summary,
        "comparison": demo.comparison,
        "sites": demo.sites,
        "bundle": str(demo.report.bundle.folder),
        "tampered": demo.refusal,
        "digests_without_dp": list(demo.digests),
    }

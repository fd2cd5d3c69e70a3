"""`lepton-fed audit`: is a run as private as it claims?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fed.cli.screen import AsJson, guarded, print_json, show_problems, stdout

if TYPE_CHECKING:
    from lepton_fed.audit.report import AuditReport

_CODES = {
    "noise": "LF4701",
    "contribution": "LF4702",
    "bound": "LF4703",
    "accounting": "LF4704",
    "membership": "LF4705",
}
_VERDICTS = {True: "pass", False: "FAIL", None: "note"}
_SHADOWS = 64


def audit(
    run: Annotated[str, typer.Argument(help="A run's folder, its name or short id, or last.")],
    root: Annotated[Path, typer.Option("--runs", help="Folder of all runs.")] = Path("runs"),
    site: Annotated[
        Path | None,
        typer.Option("--site", help="At a site: its conf. RUN is then a run that it agreed to."),
    ] = None,
    canaries: Annotated[
        int, typer.Option(min=200, max=10000, help="Records that are watched; more prove more.")
    ] = 1000,
    attacks: Annotated[
        bool,
        typer.Option("--attacks", help="Attack a round too: who was a member, what was a record."),
    ] = False,
    shadows: Annotated[
        int, typer.Option(min=8, max=1000, help="Models to train for --attacks; more tell more.")
    ] = _SHADOWS,
    as_json: AsJson = False,
) -> None:
    """Train as a run did, with records to watch, and hold what is seen against its epsilon."""
    with guarded(as_json=as_json):
        from lepton_fed.audit.claims import claims_of_run, claims_of_site
        from lepton_fed.audit.report import write_report
        from lepton_fed.audit.run import audit as look
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ClientConf
        from lepton_fed.errors import Problem, Refused
        from lepton_fed.runs.folder import find_run

        if site is None:
            claims = claims_of_run(find_run(run, root))
        else:
            claims = claims_of_site(run, load_conf(site, kind=ClientConf).conf)
        report = look(claims, canaries, shadows if attacks else 0)
        write_report(report, claims.verdict)
        if as_json:
            print_json(report)
        else:
            _show(report, claims.verdict)
        if report.failed:
            problems = [Problem(_CODES[f.name], f.found, where=report.run) for f in report.failed]
            show_problems(problems)
            raise typer.Exit(Refused.exit_code)


def _show(report: AuditReport, written: Path) -> None:
    out = stdout()
    for check in report.checks:
        out.print(f"{check.name:<13} {_VERDICTS[check.passed]}  {check.found}", markup=False)
    if report.checks:
        out.print(
            f"audited       {report.steps} steps with {report.canaries} canaries in "
            f"{report.seconds:.0f} s; delta {report.delta:g}, {report.adjacency}, "
            f"{report.sampler} sampler",
            markup=False,
        )
    if report.attacks is not None:
        for attack in report.attacks.attacks:
            out.print(f"{attack.name:<13} {_VERDICTS[attack.passed]}  {attack.found}", markup=False)
        out.print(
            f"attacked      round 1, in which the coordinator receives "
            f"{report.attacks.received}; {report.attacks.records} rows, {report.attacks.rows}; "
            f"{report.attacks.shadows} models in {report.attacks.seconds:.0f} s",
            markup=False,
        )
    out.print(f"record        {written}", markup=False)

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
}


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
        report = look(claims, canaries)
        write_report(report, claims.verdict)
        if as_json:
            print_json(report)
        else:
            _show(report, claims.verdict)
        failed = [check for check in report.checks if not check.passed]
        if failed:
            show_problems([Problem(_CODES[c.name], c.found, where=report.run) for c in failed])
            raise typer.Exit(Refused.exit_code)


def _show(report: AuditReport, written: Path) -> None:
    out = stdout()
    for check in report.checks:
        verdict = "pass" if check.passed else "FAIL"
        out.print(f"{check.name:<13} {verdict}  {check.found}", markup=False)
    out.print(
        f"audited       {report.steps} steps with {report.canaries} canaries in "
        f"{report.seconds:.0f} s; delta {report.delta:g}, {report.adjacency}, {report.sampler} "
        "sampler",
        markup=False,
    )
    out.print(f"record        {written}", markup=False)

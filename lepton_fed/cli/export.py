"""`lepton-fed export`: from a finished run to a signed bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, print_table, size, stdout

if TYPE_CHECKING:
    from lepton_fed.export.release import ExportReport


def export(
    run: Annotated[str, typer.Argument(help="A run's folder, its name or short id, or last.")],
    overrides: Overrides = None,
    key: Annotated[Path, typer.Option(help="The coordinator's private key; signs.")] = Path(
        "keys/coordinator.pem"
    ),
    root: Annotated[Path, typer.Option("--runs", help="Folder of all runs.")] = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(help="Where the bundle goes; the run's folder when left out.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="The bundle's version; one more than the newest when left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's model as ONNX, check it against PyTorch, sign it."""
    with guarded(as_json=as_json):
        from lepton_fed.runs.folder import find_run

        folder = find_run(run, root)
        from lepton_fed.config.load import kind_of, load_conf
        from lepton_fed.config.schema import KINDS, ClientConf
        from lepton_fed.errors import Problem, RunError

        loaded = load_conf(folder.conf, overrides or [], kind=KINDS[kind_of(folder.conf)])
        if isinstance(loaded.conf, ClientConf):
            raise RunError(Problem("LF5206", "this is no run", where=str(folder.path)))
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.server.release import export_run

        report = export_run(folder, loaded.conf, key=key, target=out, version=version)
        if as_json:
            print_json(
                {
                    "bundle": str(report.bundle.folder),
                    "version": report.bundle.manifest.version,
                    "signer": report.signer,
                    "bytes": report.size_bytes,
                    "parity": report.parity,
                    "seconds": report.seconds,
                }
            )
            return
        show_report(report)
        public = key.with_suffix(".pub")
        stdout().print(
            f"\nnext: lepton-fed predict --bundle {report.bundle.folder} --key {public} "
            "--input FILE",
            markup=False,
        )


def show_report(report: ExportReport) -> None:
    """Print what an export did."""
    files = report.bundle.manifest.files
    rows = [[name, size(record.bytes), record.sha256[:12]] for name, record in files.items()]
    print_table(
        f"bundle version {report.bundle.manifest.version}", ["file", "size", "sha256"], rows
    )
    worst = max(report.parity.checks, key=lambda check: check.difference)
    batches = ", ".join(str(check.batch) for check in report.parity.checks)
    out = stdout()
    out.print(
        f"parity      ONNX Runtime against PyTorch, {report.parity.inputs}: batches {batches}, "
        f"largest difference {worst.difference:.1e} (allowed {worst.tolerance:.1e})",
        markup=False,
    )
    out.print(f"signed by   {report.signer}", markup=False)
    out.print(f"bundle      {report.bundle.folder}", markup=False)

"""`lepton-fed init`: conf files and a signing key for a new project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lepton_fed.cli.screen import AsJson, guarded, print_json, stdout


def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the project; made when missing.")
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Write commented conf files and a signing key for a new project; nothing is overwritten."""
    with guarded(as_json=as_json):
        from lepton_fed.config.render import render
        from lepton_fed.config.schema import KINDS
        from lepton_fed.config.templates import template
        from lepton_fed.errors import ConfError, Problem
        from lepton_fed.export.keys import generate_key

        files = {folder / "conf" / f"{kind}.yaml": render(template(kind), kind) for kind in KINDS}
        key = folder / "keys" / "coordinator.pem"
        there = [path for path in (*files, key, key.with_suffix(".pub")) if path.exists()]
        if there:
            raise ConfError(
                [
                    Problem("LF1201", "this file is already there, so nothing was written",
                            where=str(path), remedy="move it away, or give another folder")
                    for path in there
                ]
            )  # fmt: skip
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        key.parent.mkdir(parents=True, exist_ok=True)
        generate_key(key)
        written = [str(path) for path in (*files, key, key.with_suffix(".pub"))]
        if as_json:
            print_json({"written": written})
            return
        out = stdout()
        for name in written:
            out.print(f"wrote {name}", markup=False)
        out.print("\nnext: lepton-fed check, then lepton-fed simulate")

"""`lepton-fed init`: conf files and a signing key for a new project."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from lepton_fed.cli.screen import AsJson, guarded, print_json, stdout
from lepton_fed.errors import ConfError, Problem


def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the project; made when missing.")
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Write commented conf files and a signing key for a new project; nothing is overwritten."""
    with guarded(as_json=as_json):
        try:
            written = [str(path) for path in _write(folder)]
        except OSError as error:
            raise ConfError(
                Problem("LF1204", f"this cannot be written: {error.strerror}",
                        where=str(error.filename or folder),
                        remedy="give a folder with room for it that you may write to")
            ) from error  # fmt: skip
        if as_json:
            print_json({"written": written})
            return
        out = stdout()
        for name in written:
            out.print(f"wrote {name}", markup=False)
        first = "" if folder.samefile(".") else f"cd {shlex.quote(str(folder))}, then "
        out.print(f"\nnext: {first}lepton-fed check, then lepton-fed simulate", markup=False)


def _write(folder: Path) -> list[Path]:
    """Write all files of a project, or leave everything as it was."""
    from lepton_fed.config.render import render
    from lepton_fed.config.schema import KINDS
    from lepton_fed.config.templates import template
    from lepton_fed.identity.keys import generate_key

    files = {folder / "conf" / f"{kind}.yaml": render(template(kind), kind) for kind in KINDS}
    key = folder / "keys" / "coordinator.pem"
    written = [*files, key, key.with_suffix(".pub")]
    there = [path for path in written if path.exists()]
    if there:
        raise ConfError(
            [
                Problem("LF1201", "this file is already there, so nothing was written",
                        where=str(path), remedy="move it away, or give another folder")
                for path in there
            ]
        )  # fmt: skip
    with ExitStack() as undo:
        for path, text in files.items():
            _make_folder(path.parent, undo)
            with path.open("x", encoding="utf-8") as file:
                undo.callback(_if_possible, path.unlink)
                file.write(text)
        _make_folder(key.parent, undo)
        generate_key(key)
        undo.pop_all()
    return written


def _make_folder(folder: Path, undo: ExitStack) -> None:
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir()
            undo.callback(_if_possible, each.rmdir)


def _if_possible(action: Callable[[], None]) -> None:
    with suppress(OSError):  # the error that made it necessary is the one to tell
        action()

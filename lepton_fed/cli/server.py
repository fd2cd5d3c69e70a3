"""`lepton-fed server`: the coordinator."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, stdout
from lepton_fed.cli.simulate import show_summary

if TYPE_CHECKING:
    from lepton_fed.server.service import Finished


def server(
    conf: Annotated[Path, typer.Option("--conf", help="The conf file.")] = Path("conf/server.yaml"),
    overrides: Overrides = None,
    once: Annotated[
        bool, typer.Option("--once", help="End after the run instead of waiting for more to do.")
    ] = False,
    new: Annotated[
        bool,
        typer.Option("--new", help="Begin the conf's run anew, also if one was interrupted."),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with this run instead: folder, name, id or last."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Be the coordinator: wait for the sites, train with them, then serve pushes until stopped.

    A run that was interrupted, even by kill -9 or a power cut, goes on from its last round.
    """
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ServerConf
        from lepton_fed.errors import ConfError, Problem

        loaded = load_conf(conf, overrides or [], kind=ServerConf)
        if resume == "" or (resume and new):
            what = (
                "--resume needs the name of a run"
                if not resume
                else ("--new begins a run and --resume goes on with one")
            )
            raise ConfError(
                Problem("LF1058", what, where="command line", remedy="see: lepton-fed runs list")
            )
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.runs.progress import view_for
        from lepton_fed.server.service import serve

        stop = threading.Event()

        def end(*_: object) -> None:
            """End at once: a run in progress goes on at the next start."""
            stop.set()
            raise KeyboardInterrupt

        def told(finished: Finished) -> None:
            if as_json:
                print_json(finished.summary)
                return
            show_summary(finished.summary)
            stdout().print(f"record      {finished.folder.path}", markup=False)
            stdout().print(f"\nnext: lepton-fed export {finished.folder.path}", markup=False)

        signal.signal(signal.SIGTERM, end)
        try:
            with view_for(sys.stderr) as view:
                serve(
                    loaded,
                    once=once,
                    new=new,
                    resume=resume or "",
                    listeners=(view,),
                    told=told,
                    stop=stop,
                )
        except KeyboardInterrupt:
            if once or not stop.is_set():  # a service that was told to stop did what it was told
                raise

"""`lepton-fed runs`: what was run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    guarded,
    print_json,
    print_table,
    show_failure,
    stdout,
)
from lepton_fed.cli.simulate import show_summary

if TYPE_CHECKING:
    from lepton_fed.runs.folder import RunFolder

app = typer.Typer(
    help="List runs, show one, or give the coordinator another.", no_args_is_help=True
)

Root = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]


@app.command("list")
def list_(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List all runs, the newest last."""
    with guarded(as_json=as_json):
        from lepton_fed.runs.folder import list_runs

        found = [_row(run) for run in list_runs(root)]
        if as_json:
            print_json(found)
            return
        if not found:
            stdout().print(f"no runs in {root}; lepton-fed simulate makes one", markup=False)
            return
        from lepton_fed.runs.progress import headline

        rows = [
            [
                row["run"],
                row["state"],
                str(row["rounds"]),
                headline(row["metrics"]),
                row["digest"][:8],
            ]
            for row in found
        ]
        print_table(
            "runs", ["run", "state", "rounds", "metric", "digest"], rows, words=2, narrow=True
        )


@app.command("show")
def show(
    run: Annotated[str, typer.Argument(help="A run's folder, its name or short id, or last.")],
    root: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show a run: its summary, what was refused, and whether its event log is whole."""
    with guarded(as_json=as_json):
        from lepton_fed.runs.events import read_events
        from lepton_fed.runs.folder import find_run

        folder = find_run(run, root)
        summary = folder.read_summary()
        events = read_events(folder.events, summary.events if summary else "")
        refused = [e for e in events if e["event"] in ("reply.refused", "counts.refused")]
        if as_json:
            print_json(
                {
                    "run": folder.name,
                    "state": _state(folder),
                    "summary": summary,
                    "refused": refused,
                    "events": len(events),
                }
            )
            return
        out = stdout()
        out.print(
            f"{folder.name}: {_state(folder)}; {len(events)} events, chain whole", markup=False
        )
        for event in refused:
            line = f"round {event['round']}: {event['site']}: {event['why']} ({event['code']})"
            out.print(line, markup=False)
        if summary is not None:
            show_summary(summary)


@app.command("submit")
def submit(
    overrides: Overrides = None,
    conf: Annotated[
        Path,
        typer.Option("--conf", help="What to run; its state folder is the running coordinator's."),
    ] = Path("conf/server.yaml"),
    wait: Annotated[float, typer.Option(min=1, help="Give up after this many seconds.")] = 86400.0,
    as_json: AsJson = False,
) -> None:
    """Give the running coordinator another run, and wait until it is finished."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ServerConf

        loaded = load_conf(conf, overrides or [], kind=ServerConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.runs.files import write_atomic
        from lepton_fed.server.jobs import Job, Jobs

        jobs = Jobs(Path(loaded.conf.state))
        resolved = jobs.conf_file()
        write_atomic(resolved, loaded.resolved_yaml().encode())
        try:
            result = jobs.give(Job("run", str(resolved.absolute())), wait)
        finally:
            resolved.unlink(missing_ok=True)
        show_failure(result, as_json=as_json)
        if as_json:
            print_json(result)
        else:
            stdout().print(f"finished    {result['folder']}", markup=False)
            stdout().print(f"\nnext: lepton-fed export {result['folder']}", markup=False)


def _row(run: RunFolder) -> dict[str, Any]:
    from lepton_fed.errors import RunError

    state, summary = "damaged", None
    try:
        summary = run.read_summary()
        state = _state(run)
    except RunError:
        pass  # `runs show` says what is wrong with it; the others are listed all the same
    return {
        "run": run.name,
        "state": state,
        "rounds": summary.rounds if summary else 0,
        "metrics": summary.metrics if summary else {},
        "digest": summary.digest if summary else "",
        "exported": run.bundle.exists(),
    }


def _state(run: RunFolder) -> str:
    if run.read_summary() is None:
        return "not finished"
    return "exported" if run.bundle.exists() else "finished"

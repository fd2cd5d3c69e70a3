"""`lepton-fed runs`: what was run, what runs, and how each site takes part."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    ago,
    guarded,
    print_json,
    print_table,
    show_failure,
    size,
    span,
    stdout,
    table_width,
)
from lepton_fed.cli.simulate import show_summary
from lepton_fed.cli.streams import reader_left

if TYPE_CHECKING:
    from lepton_fed.runs.events import Event
    from lepton_fed.runs.status import Incident, RunStatus, SiteStatus

app = typer.Typer(
    help="List runs, show one, watch one, or give the coordinator another.", no_args_is_help=True
)

Root = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
Run = Annotated[str, typer.Argument(help="A run's folder, its name or short id, or last.")]

_REFUSED = ("reply.refused", "counts.refused", "site.refused")
_SHOWN = 20
_LOOK_S = 0.2
_KEPT = 5  # columns of the list that a narrow screen shows too, up to the metric
_NOT_FINISHED = 5
_INTERRUPTED = 130


@app.command("list")
def list_(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """List all runs, the newest last."""
    with guarded(as_json=as_json):
        from lepton_fed.runs.folder import list_runs
        from lepton_fed.runs.status import outline

        found = [outline(run) for run in list_runs(root)]
        if as_json:
            print_json([_brief(run) for run in found])
        elif not found:
            stdout().print(f"no runs in {root}; lepton-fed simulate makes one", markup=False)
        else:
            _print_runs(found, datetime.now(UTC))


@app.command("show")
def show(
    run: Run,
    root: Root = Path("runs"),
    everything: Annotated[
        bool, typer.Option("--all", help="Print every refusal, not only the newest 20.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run: its state, each site's part, what was refused, and whether its log is whole."""
    with guarded(as_json=as_json):
        from lepton_fed.audit.report import read_report
        from lepton_fed.runs.folder import find_run
        from lepton_fed.runs.status import read_status

        folder = find_run(run, root)
        status, events = read_status(folder)
        summary = folder.read_summary()
        refused = [event for event in events if event["event"] in _REFUSED]
        if as_json:
            print_json(
                {**vars(status), "summary": summary, "refused": refused, "events": len(events)}
            )
            return
        now = datetime.now(UTC)
        _print_state(status, len(events), now)
        if status.sites:
            _print_sites(status, now)
        _print_refused(refused, everything=everything)
        if summary is not None:
            show_summary(summary)
        audited = read_report(folder.path / "audit.json")
        if audited is not None:
            stdout().print(f"audit       {audited.verdict}", markup=False)


@app.command("follow")
def follow(
    run: Annotated[
        str, typer.Argument(help="A run's folder, its name or short id, or last.")
    ] = "last",
    root: Root = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON lines, on a terminal too.")
    ] = False,
) -> None:
    """Show a run's events as they happen, until it ends; exit code 0 when it finished."""
    with guarded():
        from lepton_fed.runs.folder import find_run
        from lepton_fed.runs.progress import LineView, view_for
        from lepton_fed.runs.progress import follow as watch
        from lepton_fed.runs.status import read_status

        folder = find_run(run, root)
        view = LineView(sys.stdout) if as_json else view_for(sys.stdout)
        lines = isinstance(view, LineView)
        if not lines:
            stdout().print(f"follows {folder.name}; Ctrl-C ends the view, not the run")
        try:
            with view:
                state = watch(folder, view, _wait)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        if not lines:
            _print_state(*_counted(read_status(folder)), datetime.now(UTC))
        if state != "finished":
            if lines:
                sys.stderr.write(f"the run is {state}; lepton-fed runs show {folder.name}\n")
            raise typer.Exit(_NOT_FINISHED)


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


def _wait() -> None:
    """Wait a moment for more of a run's log, unless nobody reads what is printed any more."""
    if reader_left():
        raise typer.Exit
    time.sleep(_LOOK_S)


def _counted(found: tuple[RunStatus, list[Event]]) -> tuple[RunStatus, int]:
    return found[0], len(found[1])


def _brief(run: RunStatus) -> dict[str, Any]:
    return {
        "run": run.run,
        "state": run.state,
        "code": run.code,
        "round": run.round,
        "rounds": run.rounds,
        "sites": len(run.sites),
        "metrics": run.metrics,
        "began": run.began,
        "seconds": run.seconds,
        "digest": run.digest,
        "exported": run.state == "exported",
    }


def _print_runs(found: Sequence[RunStatus], now: datetime) -> None:
    from lepton_fed.runs.progress import headline, headline_name

    names = {headline_name(run.metrics) for run in found} - {""}
    # One name for all stands in the heading: the digest has room then in 80 columns.
    shared = names.pop() if len(names) == 1 else ""
    rows = [
        [
            run.run,
            run.state,
            _rounds(run.round, run.rounds),
            str(len(run.sites) or "-"),
            headline(run.metrics).removeprefix(f"{shared} "),
            _took(run, now),
            run.digest[:8],
        ]
        for run in found
    ]
    columns = ["run", "state", "round", "sites", shared or "metric", "took", "digest"]
    while len(columns) > _KEPT and table_width([columns, *rows]) > stdout().width:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table("runs", columns, rows, words=2, narrow=True)


def _took(run: RunStatus, now: datetime) -> str:
    if run.state == "running" and run.began:
        return span((now - datetime.fromisoformat(run.began)).total_seconds())
    return span(run.seconds) if run.began else "-"


def _rounds(done: int, of: int) -> str:
    return f"{done}/{of}" if of else "-"


def _print_state(status: RunStatus, events: int, now: datetime) -> None:
    out = stdout()
    state = f"{status.state} ({status.code})" if status.code else status.state
    rounds = f"{status.round} of {status.rounds} rounds" if status.rounds else "before its rounds"
    whole = f"{events} events, chain whole" if events else "no events"
    out.print(f"{status.run}: {state}, {rounds}; {whole}", markup=False)
    if status.began:
        took = f"took {_took(status, now)}{' so far' * (status.state == 'running')}"
        out.print(f"began       {ago(status.began, now, ' UTC')}; {took}")
    if status.state == "running" and status.newest:
        out.print(f"last event  {ago(status.newest, now, ' UTC')}")
    if status.waiting:
        out.print(f"waits for   {', '.join(status.waiting)}", markup=False)


def _print_sites(status: RunStatus, now: datetime) -> None:
    rows = [
        [
            site.name,
            _rounds(site.rounds, status.rounds),
            ago(site.seen, now) if site.seen else "-",
            site.version or "-",
            _epsilon(site.epsilon),
            _epsilon(site.budget_left),
            size(site.received_bytes),
        ]
        for site in status.sites
    ]
    columns = ["site", "used", "seen (UTC)", "version", "epsilon", "left", "received"]
    print_table("sites", columns, rows, narrow=True)
    out = stdout()
    for site in status.sites:
        if site.last is not None:
            out.print(f"{site.name}: {_missed(site, site.last)}", markup=False)
    out.print(f"bytes       {size(status.sent_bytes)} sent, {size(status.received_bytes)} received")


def _missed(site: SiteStatus, last: Incident) -> str:
    counts = [
        f"{kind} {count} {'time' if count == 1 else 'times'}"
        for kind, count in (
            ("late", site.late), ("refused", site.refused), ("absent", site.absent)
        )
        if count
    ]  # fmt: skip
    where = f"round {last.round}" if last.round else "the offer of the run"
    code = f" ({last.code})" if last.code else ""
    return "; ".join([*counts, f"last {last.kind}: {where}: {last.why}{code}"])


def _epsilon(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _print_refused(refused: Sequence[Mapping[str, Any]], *, everything: bool) -> None:
    out = stdout()
    shown = refused if everything else refused[-_SHOWN:]
    if len(shown) < len(refused):
        out.print(f"{len(refused)} refusals, the newest {len(shown)} of them; --all prints all")
    for event in shown:
        where = f"round {event['round']}" if "round" in event else "offer"
        line = f"{where}: {event['site']}: {event['why']} ({event['code']})"
        out.print(line, markup=False)

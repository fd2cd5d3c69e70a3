"""`lepton-fed check`: everything that can be known to be wrong before a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    guarded,
    print_json,
    print_table,
    show_problems,
)

if TYPE_CHECKING:
    from lepton_fed.runs.checks import Checklist


def check(
    conf: Annotated[Path, typer.Option("--conf", help="The conf file.")] = Path(
        "conf/simulation.yaml"
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check a conf, its task, its data and its privacy before anything is run."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import kind_of, load_conf
        from lepton_fed.config.plugin_checks import plugin_problems
        from lepton_fed.config.schema import KINDS
        from lepton_fed.errors import ConfError

        loaded = load_conf(conf, overrides or [], kind=KINDS[kind_of(conf)])
        problems = plugin_problems(loaded)
        if problems:
            raise ConfError(problems)
    with guarded(as_json=as_json, loaded=loaded):
        checks = _checks(loaded.conf)
        found = [
            replace(item, problems=tuple(loaded.located(problem) for problem in item.problems))
            for item in checks.checks
        ]
        if as_json:
            print_json({"ok": checks.exit_code == 0, "checks": found})
        else:
            rows = [[item.name, "FAILED" if item.problems else "ok", item.detail] for item in found]
            print_table(f"check {conf}", ["check", "", "found"], rows, words=3)
            # One thing that is wrong may fail several checks; it is said once.
            wrong = list(dict.fromkeys(problem for item in found for problem in item.problems))
            if wrong:
                show_problems(wrong)
        raise typer.Exit(checks.exit_code)


def _checks(conf: Any) -> Checklist:
    from lepton_fed.config.schema import ClientConf, ServerConf

    if isinstance(conf, ClientConf):
        from lepton_fed.clients.preflight import check_client

        return check_client(conf)
    if isinstance(conf, ServerConf):
        from lepton_fed.server.preflight import check_server

        return check_server(conf)
    from lepton_fed.simulations.preflight import check_simulation

    return check_simulation(conf)

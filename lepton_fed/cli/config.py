"""`lepton-fed config`: what a conf says, and what its keys mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, stdout

app = typer.Typer(help="Show a conf as resolved, or explain one of its keys.", no_args_is_help=True)

_CONF = Path("conf/simulation.yaml")

ConfPath = Annotated[Path, typer.Option("--conf", help="The conf file.")]


@app.command("show")
def show(conf: ConfPath = _CONF, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a conf as resolved: every key, defaults and overrides included."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import kind_of, load_conf
        from lepton_fed.config.schema import KINDS

        loaded = load_conf(conf, overrides or [], kind=KINDS[kind_of(conf)])
        if as_json:
            print_json(loaded.conf)
        else:
            stdout().print(loaded.resolved_yaml(), markup=False, end="")


@app.command("explain")
def explain(
    key: Annotated[
        str,
        typer.Argument(help="Dotted key, for example privacy.record.epsilon; none lists them."),
    ] = "",
    overrides: Overrides = None,
    conf: ConfPath = _CONF,
    kind: Annotated[
        str, typer.Option(help="simulation, server or client; taken from the conf if it is there.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print a key's meaning, type, bounds, default, and where its present value comes from."""
    with guarded(as_json=as_json):
        from lepton_fed.config.explain import explain as explanation_of
        from lepton_fed.config.load import kind_of, load_conf, load_values
        from lepton_fed.config.schema import KINDS
        from lepton_fed.config.templates import template
        from lepton_fed.errors import ConfError, Problem

        if kind and kind not in KINDS:
            raise ConfError(
                Problem("LF1202", f"{kind!r} is no kind of conf", where="command line",
                        remedy=f"one of {', '.join(KINDS)}")
            )  # fmt: skip
        if conf.exists():
            found = kind_of(conf)
            wanted = kind or found
            loaded = (
                load_conf(conf, overrides or [], kind=KINDS[found]) if wanted == found else None
            )
        else:
            wanted = kind or "simulation"
            loaded = None
        if loaded is None and overrides:
            loaded = load_values(KINDS[wanted], template(wanted), overrides)
        explanation = explanation_of(wanted, key, loaded)
        if as_json:
            print_json(explanation.as_dict())
        else:
            stdout().print(explanation.text(), markup=False)

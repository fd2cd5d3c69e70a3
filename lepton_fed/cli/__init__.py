"""The command line: one file a command, each importing what it needs when it runs.

torch, flwr and Opacus cost seconds to import, so that `--help` must not; nothing here or at the top
of a command's file imports them.
"""

from __future__ import annotations

import sys

import typer

from lepton_fed.cli import (
    audit,
    check,
    client,
    config,
    demo,
    export,
    init,
    keys,
    ledger,
    predict,
    privacy,
    push,
    receipts,
    runs,
    server,
    simulate,
)
from lepton_fed.cli.screen import EXIT_CODES, guarded
from lepton_fed.cli.streams import steady_streams

__all__ = ["app", "main"]

app = typer.Typer(
    name="lepton-fed",
    help="Federated learning for organisations whose data may not leave them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("init")(init.init)
app.command("check")(check.check)
app.add_typer(config.app, name="config")
app.add_typer(privacy.app, name="privacy")
app.add_typer(keys.app, name="keys")
app.command("server")(server.server)
app.command("client")(client.client)
app.command("receipts")(receipts.receipts)
app.add_typer(ledger.app, name="ledger")
app.command("push")(push.push)
app.command("simulate")(simulate.simulate)
app.command("export")(export.export)
app.command("predict")(predict.predict)
app.add_typer(runs.app, name="runs")
app.command("audit")(audit.audit)
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        from lepton_fed import __version__

        typer.echo(f"lepton-fed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Federated learning for organisations whose data may not leave them."""
    del version


def main() -> None:
    """Run the command line."""
    steady_streams()
    try:
        with guarded():  # what is printed outside a command, such as the help
            app()
    except typer.Exit as end:
        sys.exit(end.exit_code)

"""`lepton-fed push`: a bundle, through the running coordinator, to every site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lepton_fed.cli.screen import (
    AsJson,
    Overrides,
    guarded,
    print_json,
    print_table,
    show_failure,
    size,
)


def push(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    overrides: Overrides = None,
    conf: Annotated[Path, typer.Option("--conf", help="The running coordinator's conf.")] = Path(
        "conf/server.yaml"
    ),
    wait: Annotated[float, typer.Option(min=1, help="Give up after this many seconds.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Offer a bundle to every site; each verifies it and takes it into use, or says why not.

    A push that was interrupted goes on where it stopped. The exit code is 4 when a site refused.
    """
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ServerConf

        loaded = load_conf(conf, overrides or [], kind=ServerConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.export.bundle import verify_bundle
        from lepton_fed.identity.keys import load_private_key
        from lepton_fed.server.jobs import Job, Jobs

        # Looked at here too: what is wrong with it is best said before anybody is asked.
        verify_bundle(bundle, load_private_key(Path(loaded.conf.signing_key)).public_key())
        result = Jobs(Path(loaded.conf.state)).give(Job("push", str(bundle.resolve())), wait)
        show_failure(result, as_json=as_json)
        if as_json:
            print_json(result)
        else:
            _show(result)
        if any(site.get("refusal") for site in result["sites"].values()):
            raise typer.Exit(4)


def _show(result: dict[str, Any]) -> None:
    rows = []
    for name, site in sorted(result["sites"].items()):
        if site.get("absent"):
            rows.append([name, "not online", "-", "-"])
            continue
        refusal = site.get("refusal")
        state = f"refused: {refusal['what']} [{refusal['code']}]" if refusal else "in use"
        rows.append([name, state, str(site["in_force"] or "-"), size(site["bytes_sent"])])
    print_table(
        f"bundle version {result['version']} of task {result['task'][:12]}",
        ["site", "", "version in use", "sent"],
        rows,
        words=2,
    )

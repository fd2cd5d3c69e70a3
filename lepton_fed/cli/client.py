"""`lepton-fed client`: a site."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded


def client(
    conf: Annotated[Path, typer.Option("--conf", help="The site's conf.")] = Path(
        "conf/client.yaml"
    ),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Be a site: connect to the coordinator, train what the policy allows, keep receipts."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ClientConf

        loaded = load_conf(conf, overrides or [], kind=ClientConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.clients.supervisor import run_site

        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        run_site(loaded.conf, stop)

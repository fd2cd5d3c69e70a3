"""A federation of stock Flower, set up as its documentation says, with nothing changed.

`flower-superlink` and a `flower-supernode` for each site, with TLS and node authentication; they
start the processes of the app themselves. What they write goes into a FLWR_HOME of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import stock_app
from benchmarks.processes import process
from benchmarks.setting import Setting

__all__ = ["app", "stock_federation"]

_START_S = 60.0
_CONFIG = """\
[superlink]
default = "benchmark"

[superlink.benchmark]
address = "127.0.0.1:{port}"
root-certificates = "{ca}"
"""
_APP = """\
[project]
name = "benchmark"
version = "1.0.0"
description = "FedAvg of a model that nobody trains"
license = "Apache-2.0"
dependencies = ["flwr"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"

[tool.flwr.app.config]
sites = {sites}
floats = {floats}
rounds = {rounds}
turns = "{turns}"
"""


@contextmanager
def stock_federation(setting: Setting) -> Iterator[None]:
    """Run a federation of stock Flower whose app takes its turns as ``setting`` says.

    Args:
        setting: The federation; its keys are made.
    """
    commands = Path(sys.executable).parent
    home = Path(setting.folder) / "flower"
    home.mkdir()
    ca = setting.key("tls/ca.crt")
    (home / "config.toml").write_text(_CONFIG.format(port=setting.port, ca=ca))
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }
    link = [
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", str(setting.port)),
        *("--ssl-certfile", str(setting.key("tls/server.crt"))),
        *("--ssl-keyfile", str(setting.key("tls/server.key"))),
        *("--ssl-ca-certfile", str(ca)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]
    if setting.database:
        link += ["--database", str(home / "superlink.sqlite")]
    with ExitStack() as parties:
        parties.enter_context(process(link, home / "superlink.log", environment))
        for name in setting.names:
            _tell(environment, "supernode", "register", str(setting.key(f"{name}.node.pub")))
        for number, name in enumerate(setting.names):
            node = [
                "flower-supernode",
                *("--superlink", f"127.0.0.1:{setting.port}"),
                *("--root-certificates", str(ca)),
                *("--auth-supernode-private-key", str(setting.key(f"{name}.node"))),
                *("--host", "127.0.0.1", "--port", str(setting.port + 1 + number)),
                *("--node-config", f"site={number}"),
            ]
            parties.enter_context(process(node, home / f"{name}.log", environment))
        _tell(environment, "run", str(app(setting, home / "app")))
        yield


def app(setting: Setting, folder: Path) -> Path:
    """Write the app as stock Flower takes it into a new folder."""
    folder.mkdir()
    shutil.copy(stock_app.__file__, folder / "stock_app.py")
    settings = {"sites": setting.sites, "floats": setting.floats, "rounds": setting.rounds}
    (folder / "pyproject.toml").write_text(_APP.format(**settings, turns=setting.turns))
    return folder


def _tell(environment: dict[str, str], *words: str) -> None:
    """Run `flwr` with these words, again while the SuperLink is starting."""
    until = time.monotonic() + _START_S
    while True:
        command = ["flwr", *words, "benchmark"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
        if ended.returncode == 0:
            return
        if time.monotonic() > until:
            raise OSError(f"{' '.join(command)}: {ended.stdout} {ended.stderr}")
        time.sleep(0.5)

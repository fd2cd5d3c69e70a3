"""flwr reads its switches when it is imported: they must be set by then, whatever they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
LOG = {"FLWR_LOG_LEVEL": "WARNING"}  # unless somebody wants to see more

WATCH = """
import json, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "flwr" and "seen" not in globals():
            globals()["seen"] = {k: v for k, v in os.environ.items() if k.startswith("FLWR_")}

sys.meta_path.insert(0, Watch())
import lepton_fed.flower
before = "flwr" in sys.modules
import lepton_fed.flower.transport
from flwr.common import constant
from flwr.supercore import telemetry
from flwr.supercore import constant as core
print(json.dumps({
    "seen": seen,
    "before": before,
    "telemetry": telemetry.FLWR_TELEMETRY_ENABLED,
    "names": [
        core.FLWR_DISABLE_UPDATE_CHECK, constant.FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION,
    ],
}))
"""


def test_the_switches_are_set_before_flwr_is_imported_and_flwr_knows_them() -> None:
    opposite = {name: "1" if value == "0" else "0" for name, value in SWITCHES.items()}
    done = subprocess.run(
        [sys.executable, "-c", WATCH],
        env=os.environ | opposite,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seen"] == SWITCHES | LOG
    assert found["before"] is False
    assert found["telemetry"] == "0"
    assert found["names"] == list(SWITCHES)[1:]

"""What `lepton-fed check` looks at for a site, before the first contact."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.config.load import load_task
from lepton_fed.config.schema import ClientConf
from lepton_fed.data.read import read
from lepton_fed.export.keys import load_public_key
from lepton_fed.export.signature import fingerprint
from lepton_fed.runs.checks import Checklist
from lepton_fed.training.device import devices_of

__all__ = ["check_client"]


def check_client(conf: ClientConf) -> Checklist:
    """Check a site's conf.

    Args:
        conf: The conf.
    """
    checks = Checklist()
    task = checks.add(
        "task", lambda: load_task(conf.task), lambda task: f"{task.name}, {task.digest[:12]}"
    )
    if task is not None:
        checks.add(
            "data",
            lambda: read(conf.source, task.data, key="source"),
            lambda rows: f"{len(rows)} rows fit the task's contract",
        )
    checks.add(
        "device", lambda: devices_of(conf.device), lambda devices: ", ".join(map(str, devices))
    )
    checks.add("coordinator key", lambda: load_public_key(Path(conf.coordinator_key)), fingerprint)
    return checks

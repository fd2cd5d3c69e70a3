"""Child processes of a benchmark: started, logged into a file, and ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["process"]

_STOP_S = 20.0


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process meanwhile.

    Args:
        command: Its command line.
        log: File for what it prints.
        environment: Its environment; None is this process's own.
    """
    with log.open("wb") as out:
        child = subprocess.Popen(command, env=environment, stdout=out, stderr=out)  # noqa: S603
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

"""Flower's SuperNode as a child process: the site's one outgoing connection, running no code.

``python -m lepton_fed.flower.supernode`` is ``flower-supernode`` in process isolation, which only
queues what the coordinator sends for whoever has the secret of its loopback Runtime API. It looks
for messages more often than stock, shows more often that it is there, waits less long for a
coordinator that is away, and ends when its parent does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

__all__ = ["REFUSED_SIGNATURE", "main", "supernode_command", "supernode_environment"]

REFUSED_SIGNATURE = "The coordinator refused the signature"
"""What its log says then; Flower's own ends without a word."""

_POLL_S = 0.1
_HEARTBEAT_S = 10  # the SuperLink takes no less
_RETRY_S = 5
_WATCH_S = 0.5
_PARENT = "LEPTON_FED_PARENT"


def supernode_command(
    *, coordinator: str, ca: Path, node_key: Path, secret: Path, port: int
) -> list[str]:
    """Return the command that runs the SuperNode.

    Args:
        coordinator: Address and port of the coordinator.
        ca: Certificate of the authority that signed the coordinator's, PEM.
        node_key: The site's private key for node authentication, OpenSSH format.
        secret: File of 32 random bytes, mode 0600; whoever holds them may take tasks.
        port: Loopback port of the Runtime API.
    """
    return [
        sys.executable,
        "-m",
        "lepton_fed.flower.supernode",
        *("--superlink", coordinator),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(node_key)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]


def supernode_environment(state: Path) -> dict[str, str]:
    """Return the environment for :func:`supernode_command`.

    Args:
        state: The site's state folder; what Flower writes goes below it.
    """
    return {
        **os.environ,
        "FLWR_HOME": str((state / "flwr").absolute()),
        _PARENT: str(os.getpid()),
    }


def main() -> None:
    """Run the SuperNode until it ends or its parent does."""
    parent = int(os.environ.get(_PARENT, os.getppid()))
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    os.environ["FLWR_LOG_LEVEL"] = "INFO"  # its log is a file of its own
    from lepton_fed.flower import compat, compat_supernode

    compat.hasten_pulls()
    compat_supernode.drop_messages_of_ended_runs()
    compat_supernode.cap_supernode_polls(_POLL_S)
    compat_supernode.hasten_heartbeats(_HEARTBEAT_S)
    compat_supernode.cap_retry_waits(_RETRY_S)
    compat_supernode.retry_broken_handshakes()
    compat_supernode.end_with_the_heartbeat()
    compat_supernode.tell_refused_signatures(REFUSED_SIGNATURE)
    try:
        compat_supernode.run_supernode()
    except Exception:  # noqa: BLE001 - said, and ended all the same
        traceback.print_exc()
    # It comes back when it gave the connection up; its API's thread would keep it up for ever,
    # deaf and without a node.
    sys.stderr.flush()
    os._exit(1)


def _watch(parent: int) -> None:
    """End this process once it is nobody's child: its owner was killed."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    main()

"""The only room that imports flwr: transport, records, and an adapter for stock strategies.

flwr reads these when it is first imported: a coordinator and its sites report to nobody, install
nothing, and flwr's own log does not cut into theirs. Its HTTP client obeys proxy variables for
loopback addresses too, which would send a machine's talk with itself to the proxy.
"""

import os

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
for _name in ("NO_PROXY", "no_proxy"):
    _hosts = [host for host in os.environ.get(_name, "").split(",") if host]
    os.environ[_name] = ",".join([*_hosts, *(h for h in _LOOPBACK if h not in _hosts)])

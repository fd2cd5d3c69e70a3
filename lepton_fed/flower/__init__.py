"""The only room that imports flwr: transport, records, and an adapter for stock strategies.

flwr reads these when it is first imported: a coordinator and its sites report to nobody, and flwr's
own log does not cut into theirs.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")

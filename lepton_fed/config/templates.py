"""The values of the conf files that are shipped, written by `lepton-fed init` and run by the demo.

The demo learns scikit-learn's handwritten digits (1797 images of 8 by 8) over three sites that hold
them in unequal shares, with record-level differential privacy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["template"]

_EPSILON, _DELTA = 8.0, 1e-5


def template(kind: str) -> dict[str, Any]:
    """Return the values of a new conf that differ from the defaults.

    Args:
        kind: A key of ``KINDS``.
    """
    return _TEMPLATES[kind]()


def _task() -> dict[str, Any]:
    return {
        "name": "digits",
        "data": {
            "kind": "image",
            "shape": [1, 8, 8],
            "target": {"classes": [str(digit) for digit in range(10)]},
        },
        "preprocessing": [{"step": "scale", "arguments": {"by": 16.0}}],
        "model": {"name": "mlp", "arguments": {"hidden": [64], "activation": "tanh"}},
        "training": {"epochs": 2, "batch_size": 64, "learning_rate": 0.6, "momentum": 0.5},
        "metrics": ["accuracy", "macro_f1"],
        "aggregation": {"norm_bound": 100.0},
    }


def _plan() -> dict[str, Any]:
    return {
        "task": _task(),
        "rounds": {"count": 20, "quorum": 3},
        "privacy": {
            "record": {"enabled": True, "epsilon": _EPSILON, "delta": _DELTA},
            "secure_aggregation": {"enabled": True},
            "outside_epsilon": ["evaluation"],
        },
        "seed": 1,
    }


def _simulation() -> dict[str, Any]:
    sites = {
        "count": 3,
        "names": ["north", "east", "south"],
        "source": {"reader": "digits"},
        "partition": {"name": "dirichlet", "arguments": {"alpha": 1.0}},
    }
    return {"kind": "simulation", **_plan(), "sites": sites}


def _server() -> dict[str, Any]:
    return {"kind": "server", **_plan()}


def _client() -> dict[str, Any]:
    return {
        "kind": "client",
        "name": "north",
        "identity_key": "keys/north.pem",
        "node_key": "keys/north.node",
        "task": "conf/server.yaml",
        "source": {"reader": "digits"},
        "policy": {
            "models": ["mlp"],
            "rounds": 100,
            "epochs": 5,
            "steps": 1000,
            "batch_size": 256,
            "seconds_per_round": 600.0,
            "hours": ["00:00-24:00"],
            "privacy": {
                "record": True,
                "epsilon": _EPSILON,
                "delta": _DELTA,
                "secure_aggregation": {"rounds_per_hour": 1000},
            },
            "leaves": ["evaluation", "epsilon"],
        },
        "budget": {"epsilon": _EPSILON, "delta": _DELTA},
        "state": "state/north",
    }


_TEMPLATES: dict[str, Callable[[], dict[str, Any]]] = {
    "simulation": _simulation,
    "server": _server,
    "client": _client,
}

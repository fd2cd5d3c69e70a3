"""No generator that can be seeded is reachable from secure aggregation, by import or by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lepton_fed

PACKAGE = Path(lepton_fed.__file__).parent
ROOM = PACKAGE / "privacy" / "secagg"
BANNED_MODULES = {"random", "torch", "scipy", "flwr", "lepton_fed.core.seeds"}
BANNED_ATTRIBUTES = {"random", "default_rng", "RandomState", "manual_seed", "seed"}


def source_of(module: str) -> Path | None:
    """Return the file of a module of this package; None for one that is not ours."""
    parts = module.split(".")
    if parts[0] != "lepton_fed":
        return None
    path = PACKAGE.joinpath(*parts[1:])
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports, each package on the way included."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def reachable(paths: list[Path]) -> dict[str, Path]:
    """Return every module that importing these files leads to, with the file that names it."""
    found: dict[str, Path] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module not in found:
                found[module] = path
                source = source_of(module)
                if source:
                    waiting.append(source)
    return found


def faults(paths: list[Path]) -> list[str]:
    modules = reachable(paths)
    found = [
        f"{path.name} imports {module}"
        for module, path in modules.items()
        if module in BANNED_MODULES or module.startswith("numpy.random")
    ]
    ours = {source for module in modules if (source := source_of(module))} | set(paths)
    for path in ours:
        # np.random is reached without an import of it.
        found += [
            f"{path.name} uses {node.attr}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES
        ]
    return found


def test_no_generator_is_reachable() -> None:
    paths = sorted(ROOM.glob("*.py"))
    assert {"masks.py", "shamir.py", "keys.py", "envelopes.py"} <= {path.name for path in paths}
    modules = reachable(paths)
    assert {"lepton_fed.core.digests", "secrets", "hashlib"} <= set(modules)
    assert faults(paths) == []


@pytest.mark.parametrize(
    "text",
    [
        "import random",
        "from random import randbytes",
        "import numpy.random",
        "from numpy import random",
        "from numpy.random import default_rng",
        "import numpy as np\nx = np.random.bytes(4)",
        "import torch",
        "from torch import rand",
        "from lepton_fed.core.seeds import generator",
        "def f():\n    import random",
        "from lepton_fed.training import local",
    ],
)
def test_the_search_finds_each_way_to_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    assert faults([path])

"""No noise that sums or models are protected by comes from a generator that can be seeded."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lepton_fed

PRIVACY = Path(lepton_fed.__file__).parent / "privacy"
FILES = sorted(
    [
        *(PRIVACY / "dp" / name for name in ("integers.py", "discrete_gaussian.py", "skellam.py")),
        *(PRIVACY / "distributed").glob("*.py"),
        *(PRIVACY / "central").glob("*.py"),
        *(PRIVACY / "factorisation").glob("*.py"),
    ]
)
BANNED_MODULES = {"random", "torch", "scipy", "secrets", "lepton_fed.core.seeds"}
BANNED_ATTRIBUTES = {"random", "default_rng", "RandomState", "Generator", "seed"}


def faults(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES:
            found.append(node.attr)
        found += [name for name in names if name in BANNED_MODULES or "numpy.random" in name]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_no_generator_is_used(path):
    assert faults(path.read_text()) == []


def test_the_only_keys_that_are_not_from_the_system_are_of_public_rotations():
    """A stream with a key of its own is made in one place: what it gives is public."""
    makers = [path.name for path in FILES if "Entropy(" in path.read_text()]
    assert makers == ["rotation.py"]


@pytest.mark.parametrize(
    "text",
    [
        "import random",
        "from numpy.random import default_rng",
        "from numpy import random",
        "x = np.random.normal()",
        "import torch",
        "from lepton_fed.core.seeds import generator",
        "from lepton_fed.core import seeds",
    ],
)
def test_the_search_finds_each_way_to_one(text):
    assert faults(text)

"""The files of the repository that are made from the schema and the templates.

`python -m lepton_fed.config.generated` in the root of the repository writes them anew; a test holds
them to what it would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lepton_fed.config.reference import conf_reference
from lepton_fed.config.render import render
from lepton_fed.config.schema import KINDS
from lepton_fed.config.templates import template

__all__ = ["generated", "write"]


def generated() -> dict[str, str]:
    """Return the text of every generated file, by its path from the root of the repository."""
    confs = {f"conf/{kind}.yaml": render(template(kind), kind) for kind in KINDS}
    return {**confs, "docs/reference/conf.md": conf_reference()}


def write(root: Path) -> None:
    """Write every generated file.

    Args:
        root: Root of the repository.
    """
    for name, text in generated().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

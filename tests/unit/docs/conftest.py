"""Pages of the documentation as programs: their files are written, their commands are run."""

from __future__ import annotations

import doctest
import glob
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app

_DOCS = Path(__file__).parents[3] / "docs"
_FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is saved as (if any), and its text."""

    language: str
    file: str
    text: str


class Page:
    """A page and the folder in which its reader works.

    ``... file`` blocks are saved, ``toml`` blocks declare entry points, and the commands of
    ``console`` blocks are run: they must succeed (or fail as an `echo $?` after them says) and
    print what the page says they print, where ``...`` stands for anything.
    """

    def __init__(self, name: str, folder: Path) -> None:
        text = (_DOCS / name).read_text()
        self.blocks = [Block(*found) for found in _FENCE.findall(text)]
        self.folder = folder

    def save(self) -> None:
        """Write every block that names its file."""
        for block in self.blocks:
            if block.file:
                (self.folder / block.file).write_text(block.text)

    def declare(self) -> None:
        """Declare the entry points of the page's pyproject.toml, as installing it would."""
        info = self.folder / "page-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: page\nVersion: 1.0\n")
        lines = []
        for block in self.blocks:
            if block.language == "toml":
                groups = tomllib.loads(block.text)["project"]["entry-points"]
                for group, points in groups.items():
                    lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))

    def run(self) -> None:
        """Run the commands of all console blocks, in order."""
        for block in self.blocks:
            if block.language == "console":
                self._run(block.text)

    def _run(self, text: str) -> None:
        steps = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
        for number, (command, printed) in enumerate(steps):
            following = steps[number + 1] if number + 1 < len(steps) else ("", "")
            expected = int(following[1]) if following[0] == "echo $?" else 0
            if command != "echo $?":
                code, output = self._call(command, failing=expected != 0)
                assert code == expected, f"{command}\n{output}"
                assert _same(printed, output), f"{command}\n{printed}\nprogram:\n{output}"

    def _call(self, command: str, *, failing: bool) -> tuple[int, str]:
        program, *words = shlex.split(command)
        if program != "lepton-fed":
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-c", command], env={**os.environ, "PATH": path}, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            return done.returncode, done.stdout + done.stderr
        spread = [each for word in words for each in sorted(glob.glob(word)) or [word]]
        result = CliRunner().invoke(app, spread, env={"COLUMNS": "110"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output if failing else result.stdout


def _same(page: str, program: str) -> bool:
    # A rule is as wide as the numbers above it.
    texts = [re.sub("─+", "─", text) for text in (page, program)]
    return doctest.OutputChecker().check_output(*texts, _SAME)


@pytest.fixture(scope="module")
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """Open the page that the test module names as ``PAGE``, in a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    page = Page(request.module.PAGE, folder)
    page.save()
    page.declare()
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield page
    for block in page.blocks:
        sys.modules.pop(block.file.removesuffix(".py"), None)

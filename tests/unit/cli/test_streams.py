"""Commands whose readers leave, whose streams are closed, or whose streams are full."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LEPTON = f"{sys.executable} -m lepton_fed"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``lepton-fed`` is the program."""
    program = f'lepton-fed() {{ {LEPTON} "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(
        ["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def without_reader(*words: str, folder: Path, code: int, both: bool = False) -> str:
    """Run a command whose stdout nobody reads; return what it says on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lepton_fed", *words], cwd=folder, stdout=writing,
            stderr=writing if both else subprocess.PIPE, check=False, text=True,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == code
    return done.stderr or ""


WORDS = {
    "lines": ("config", "show"),
    "json": ("config", "show", "--json"),
    "help": ("--help",),
    "version": ("--version",),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    assert shell("lepton-fed init", folder).returncode == 0
    return folder


@pytest.mark.parametrize("words", [*WORDS.values(), ("runs", "list")], ids=[*WORDS, "no runs"])
def test_a_reader_who_left_is_no_failure(project: Path, words: tuple[str, ...]) -> None:
    assert without_reader(*words, folder=project, code=0) == ""


@pytest.mark.parametrize("both", [False, True])
def test_an_error_keeps_its_exit_code_when_nobody_reads_it(project: Path, both: bool) -> None:
    words = ("config", "show", "rounds.count=0", "--json")
    told = without_reader(*words, folder=project, code=2, both=both)
    assert ("LF1015" in told) is not both


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_failure(project: Path, words: tuple[str, ...], closed: str) -> None:
    done = shell(f"lepton-fed {shlex.join(words)} {closed}", project)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert bool(done.stdout) is (closed == "2>&-")


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_results_that_are_lost_are_an_error(project: Path, words: tuple[str, ...]) -> None:
    done = shell(f"lepton-fed {' '.join(words)} > /dev/full", project)
    assert done.returncode == 5
    assert "No space left on device [LF5401]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_log_that_is_lost_is_no_failure(project: Path) -> None:
    done = shell("lepton-fed config show rounds.count=0 2> /dev/full", project)
    assert done.returncode == 2


def test_a_file_never_gets_the_number_of_a_closed_stream(project: Path) -> None:
    program = (
        "import json, os, sys\n"
        "from lepton_fed.cli.streams import steady_streams\n"
        "steady_streams()\n"
        "with open('opened', 'w') as file: number = file.fileno()\n"
        "with open('numbers.json', 'w') as file: json.dump(number, file)\n"
        "os.write(1, b'by number'); os.write(2, b'by number')\n"
    )
    (project / "program.py").write_text(program)
    done = shell(f"{sys.executable} program.py <&- >&- 2>&-", project)
    assert done.returncode == 0
    assert json.loads((project / "numbers.json").read_text()) not in (1, 2)

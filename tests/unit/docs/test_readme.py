"""README.md: the output it shows is what the demo prints, but for numbers and digests."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lepton_fed.cli import app

README = (Path(__file__).parents[3] / "README.md").read_text()
MASKS = (
    (r"\b[0-9a-f]{4}(?: [0-9a-f]{4}){15}\b", "FINGERPRINT"),
    (r"\b[0-9a-f]{64}\b", "DIGEST"),
    (r"\b[0-9a-f]{12}\b", "SHORT"),
    (r"\b\d{8}T\d{6}Z-digits-[0-9a-f]{4}\b", "RUN"),
    (r"(?<![\w-])\d+(?:\.\d+)?(?:e-?\d+)?\b", "#"),
    ("─+", "─"),
    (" +", " "),
)


def masked(text: str) -> list[str]:
    """Return the lines of a text without what differs from run to run, widths included."""
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return [line.strip() for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def shown() -> tuple[list[str], str]:
    """What the README says is logged and printed."""
    (block,) = re.findall(r"^```text\n\$ make demo\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    command, *lines = block.splitlines()
    assert command == ".venv/bin/lepton-fed demo --out demo"
    table = lines.index("accuracy, alone -> federated")
    return lines[:table], "\n".join(lines[table:])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """What a demo of one round logs and prints."""
    logged: list[str] = []

    class Recording(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    log, recording = logging.getLogger("lepton_fed.demo"), Recording()
    log.addHandler(recording)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("readme"))
            words = ["demo", "--out", "demo", "rounds.count=1"]
            result = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
    finally:
        log.removeHandler(recording)
    assert result.exit_code == 0, result.output
    return logged, result.stdout


def test_the_readme_shows_what_the_demo_prints(
    shown: tuple[list[str], str], done: tuple[list[str], str]
) -> None:
    assert masked(shown[1]) == masked(done[1])


def test_the_readme_shows_what_the_demo_logs(
    shown: tuple[list[str], str], done: tuple[list[str], str]
) -> None:
    assert shown[0] == done[0]


def test_the_numbers_of_the_readme_are_whole(shown: tuple[list[str], str]) -> None:
    printed = shown[1]
    assert "..." not in printed
    for label in ("run digest", "without DP"):
        assert re.search(rf"^{label} +[0-9a-f]{{64}}(?: |$)", printed, re.MULTILINE)


def test_a_mask_hides_numbers_and_nothing_else() -> None:
    line = "north    422   0.821 -> 0.934   LF4112 at 1e-05 SHA-256 " + "0af3" * 16
    assert masked(line) == ["north # # -> # LF4112 at # SHA-256 DIGEST"]

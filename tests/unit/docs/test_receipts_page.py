"""docs/reference/receipts.md against the source, and its program against receipts."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients.receipts import Receipt, Receipts, VectorRecord, receipt_of
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.privacy.client import CLAIM_AGAINST, CLAIM_DELTA, CLAIM_EPSILON

TEXT = (Path(__file__).parents[3] / "docs" / "reference" / "receipts.md").read_text()
NAMES = ("time", "site", "coordinator", "address", "task", "policy")
ABOUT = {"run": "20261120T235945Z-digits-24fe", **dict.fromkeys(NAMES, "x")}
CLIENT = ("client-level DP", CLAIM_EPSILON, CLAIM_DELTA, CLAIM_AGAINST)
REPLY = Reply(
    "north",
    Update("l", {"delta": np.ones(2, np.float32)}, 1.0),
    np.ones(3),
    epsilon=1.0,
    noise_multiplier=1.0,
    again=True,
)


def written(number: int) -> Receipt:
    ask = Ask("a" * 64, "l", number, True, True, {})
    return receipt_of(REPLY, ask, ABOUT, "delta", dict.fromkeys(CLIENT, "x"), noised=True)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Receipts, list[Path]]:
    found = Receipts(tmp_path / "receipts")
    return found, [found.write(written(number)) for number in (1, 2, 3)]


def table(after: str) -> list[str]:
    """Return the first cells of the first table after a sentence."""
    rows = TEXT.split(after, 1)[1].split("|---|---|\n", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(.+?)` \|", rows, re.MULTILINE)


def verified(folder: Path) -> subprocess.CompletedProcess[str]:
    (program,) = re.findall(r"```python verify_receipts\.py\n(.*?)```", TEXT, re.DOTALL)
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_keys_of_the_page_are_those_of_a_receipt_in_their_order() -> None:
    listed = table("none is overwritten or removed.")
    assert listed == [each.name for each in fields(Receipt)]
    assert table("Each vector:") == [each.name for each in fields(VectorRecord)]


def test_the_numbers_of_the_page_are_those_that_a_reply_may_hold() -> None:
    assert table("The names of `numbers`:") == list(written(1).numbers)


def test_the_file_of_the_page_has_the_name_that_the_first_receipt_gets(kept) -> None:
    assert f"state/north/receipts/{kept[1][0].name}\n" in TEXT


def test_the_page_s_program_finds_whole_receipts_whole_and_prints_the_head(kept) -> None:
    receipts, paths = kept
    done = verified(paths[0].parent)
    assert done.stdout == f"3 receipts, whole; the last one's hash is {receipts.head()}\n"


def test_the_page_s_program_finds_a_change_and_a_missing_receipt(kept) -> None:
    _, paths = kept
    paths[1].unlink()
    assert f"{paths[2].name} does not follow" in verified(paths[0].parent).stderr
    paths[0].write_bytes(paths[0].read_bytes().replace(b'"round":1', b'"round":2'))
    paths[2].unlink()
    assert verified(paths[0].parent).returncode == 0, "the last has none after it"

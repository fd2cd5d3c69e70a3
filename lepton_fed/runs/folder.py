"""A run's folder: its record, readable without lepton-fed.

runs/<UTC time>-<task>-<short id>/
  conf.yaml                        as resolved
  events.jsonl                     append-only, hash-chained
  metrics.csv                      round, site, metric, value
  checkpoints/round-0007.safetensors
  model.safetensors                the final model, tensors by name
  summary.json                     what the run has to say
  sites/<name>/ledger.sqlite       simulations: what each site's records have spent
  bundle/                          made by `lepton-fed export`
"""

from __future__ import annotations

import csv
import io
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import plain
from lepton_fed.core.layout import Layout, Vector
from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.files import (
    PARTIAL,
    append,
    read_tensors,
    reading,
    write_atomic,
    write_tensors,
    writing,
)
from lepton_fed.runs.summary import RunSummary

__all__ = ["ALL_SITES", "RunFolder", "find_run", "list_runs"]

_CHECKPOINTS = 2  # the newest, and one to fall back on

_TABLE = b"round,site,metric,value\n"

ALL_SITES = "all"
"""Stands for all sites together in metrics.csv."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(cls, root: Path, task: str, conf: str) -> RunFolder:
        """Make the folder of a new run.

        Args:
            root: Folder of all runs; made when missing.
            task: Name of the task.
            conf: The resolved conf, YAML.

        Raises:
            RunError: The folder cannot be made; nothing of it is left behind.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = root / f"{stamp}-{task}-{secrets.token_hex(2)}"
        try:
            path.mkdir(parents=True)
            try:
                (path / "checkpoints").mkdir()
                write_atomic(path / "conf.yaml", conf.encode())
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
        except OSError as error:
            raise RunError(
                Problem("LF5201", f"the run's folder cannot be made: {error.strerror}",
                        where=str(path), key="runs", remedy="give `runs` a folder you may write to")
            ) from error  # fmt: skip
        return cls(path)

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.path.name

    @property
    def conf(self) -> Path:
        """Return the path of the resolved conf."""
        return self.path / "conf.yaml"

    @property
    def events(self) -> Path:
        """Return the path of the event log."""
        return self.path / "events.jsonl"

    @property
    def bundle(self) -> Path:
        """Return the path of the bundle."""
        return self.path / "bundle"

    @property
    def masked(self) -> Path:
        """Return the folder of a round whose sum is being made by secure aggregation."""
        return self.path / "masked"

    @property
    def spill(self) -> Path:
        """Return the path of the folder for the single updates of the round in progress."""
        return self.path / "spill"

    def site(self, name: str) -> Path:
        """Return the folder of a simulated site's own records."""
        return self.path / "sites" / name

    def append_metrics(self, round_number: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Append metrics to ``metrics.csv``.

        Args:
            round_number: Round after which the model has them.
            values: By site (:data:`ALL_SITES` for all together), then by metric.

        Raises:
            RunError: The file cannot be written; no half of these rows is in it.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        path = self.path / "metrics.csv"
        with writing(path), path.open("ab", buffering=0) as file:
            if file.tell() == 0:
                text.write(_TABLE.decode())
            for site, metrics in values.items():
                rows.writerows(
                    [round_number, site, name, repr(float(v))] for name, v in metrics.items()
                )
            append(file, text.getvalue().encode())

    def write_checkpoint(
        self,
        round_number: int,
        tensors: Mapping[str, npt.NDArray[np.generic]],
        about: Mapping[str, str],
    ) -> None:
        """Write what a run needs to go on after a round; the newest two are kept.

        Args:
            round_number: The finished round.
            tensors: The model and the strategy's state, by name.
            about: Digests and numbers that go with them.

        Raises:
            RunError: It cannot be written.
        """
        path = self.path / "checkpoints" / f"round-{round_number:04d}.safetensors"
        write_tensors(path, tensors, about)
        for old in self._checkpoints()[:-_CHECKPOINTS]:
            with writing(old):
                old.unlink(missing_ok=True)

    def checkpoints(
        self,
    ) -> Iterator[tuple[Path, dict[str, npt.NDArray[np.generic]], dict[str, str]]]:
        """Yield path, arrays and texts of each checkpoint, the newest first.

        One that is no safetensors file has neither arrays nor texts.

        Raises:
            RunError: One cannot be read.
        """
        for path in reversed(self._checkpoints()):
            try:
                arrays, about = read_tensors(path)
            except ValueError:
                arrays, about = {}, {}
            yield path, arrays, about

    def _checkpoints(self) -> list[Path]:
        folder = self.path / "checkpoints"
        with reading(folder):
            found = list(folder.glob("round-*.safetensors"))
        # By length first: as text round-10000 comes before round-9999.
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def sweep(self) -> None:
        """Remove what a killed process had begun to write, and the updates of its round.

        Raises:
            RunError: It cannot be removed.
        """
        with writing(self.path):
            for partial in [*self.path.glob(PARTIAL), *self.path.glob(f"checkpoints/{PARTIAL}")]:
                partial.unlink(missing_ok=True)
            if self.spill.exists():
                shutil.rmtree(self.spill)

    def drop_metrics_from(self, round_number: int) -> None:
        """Take out of ``metrics.csv`` what a round that is done again will write again.

        Args:
            round_number: First round whose rows go.

        Raises:
            RunError: The file cannot be read or written.
        """
        path = self.path / "metrics.csv"
        with reading(path):
            if not path.exists():
                return
            lines = path.read_bytes().splitlines(keepends=True)
        # A kill may have cut the last line off, even the first; a power cut may leave anything.
        kept = [line for line in lines if _round_of(line) in range(round_number)]
        head = [_TABLE] if kept or _TABLE in lines else []
        write_atomic(path, b"".join([*head, *kept]))

    def write_model(self, layout: Layout, model: Vector, about: Mapping[str, str]) -> None:
        """Write the final model, tensors by name.

        Raises:
            RunError: It cannot be written.
        """
        write_tensors(self.path / "model.safetensors", layout.views(model), about)

    def read_model(self, layout: Layout) -> Vector:
        """Return the final model as a vector.

        Raises:
            RunError: The run has no final model, one of another layout, or a broken file.
        """
        path = self.path / "model.safetensors"
        with reading(path):
            if not path.exists():
                raise RunError(
                    Problem("LF5202", "this run has no final model", where=str(path),
                            remedy="`lepton-fed runs list` shows which runs are finished")
                )  # fmt: skip
        try:
            tensors, about = read_tensors(path)
            if about.get("layout") != layout.digest:
                raise ValueError("its layout is another")
            return layout.gather(tensors)
        except ValueError as error:
            raise RunError(
                Problem("LF5203", f"this is not the model of the run's task: {error}",
                        where=str(path), remedy="export with the versions the run was made with")
            ) from error  # fmt: skip

    def write_summary(self, summary: RunSummary) -> None:
        """Write ``summary.json``.

        Raises:
            RunError: It cannot be written.
        """
        text = json.dumps(plain(summary), indent=2, allow_nan=False)
        write_atomic(self.path / "summary.json", text.encode() + b"\n")

    def read_summary(self) -> RunSummary | None:
        """Return the summary; None while the run is not finished.

        Raises:
            RunError: The file is there but is no summary, or cannot be read.
        """
        path = self.path / "summary.json"
        with reading(path):
            if not path.exists():
                return None
            content = path.read_bytes()
        try:
            said = strict_json(content)
            # Summaries of earlier versions do not say whether updates were masked: they were not.
            return decode(RunSummary, {"masked": False, **said} if isinstance(said, dict) else said)
        except ValueError as error:
            raise RunError(
                Problem("LF5204", f"this is no run summary: {error}", where=str(path),
                        remedy="do not rely on this run's record")
            ) from error  # fmt: skip


def _round_of(line: bytes) -> int | None:
    """Return the round of a row of ``metrics.csv``; None of what is no whole row."""
    try:
        ((number, _, _, value),) = csv.reader([line.decode()])
        float(value)
        return int(number) if line.endswith(b"\n") else None
    except (ValueError, csv.Error):
        return None


def list_runs(root: Path) -> list[RunFolder]:
    """Return all runs below ``root``, the newest last.

    Raises:
        RunError: The folder cannot be read.
    """

    def age(conf: Path) -> tuple[str, int, str]:
        # Names are to the second; conf.yaml is written once, so its time orders those of a second.
        name = conf.parent.name
        return name.partition("-")[0], conf.stat().st_mtime_ns, name

    with reading(root):
        confs = sorted(root.glob("*/conf.yaml"), key=age) if root.is_dir() else []
    return [RunFolder(conf.parent) for conf in confs]


def find_run(words: str, root: Path) -> RunFolder:
    """Return the run that words name: a folder, a run's name or its end, or ``last``.

    Args:
        words: What the user typed.
        root: Folder of all runs.

    Raises:
        RunError: No run, or more than one, goes by these words, or a folder cannot be read.
    """
    with reading(Path(words)):
        if (Path(words) / "conf.yaml").is_file():
            return RunFolder(Path(words))
    runs = list_runs(root)
    if words == "last" and runs:
        return runs[-1]
    matching = [run for run in runs if run.name == words or run.name.endswith(f"-{words}")]
    if len(matching) == 1:
        return matching[0]
    what = "more than one run goes" if matching else "no run goes"
    raise RunError(
        Problem("LF5205", f"{what} by {words!r}", where=str(root),
                remedy=f"one of: {_names(matching or runs)}")
    )  # fmt: skip


def _names(runs: Iterable[RunFolder]) -> str:
    return ", ".join(run.name for run in list(runs)[-5:]) or "none; `lepton-fed simulate` makes one"

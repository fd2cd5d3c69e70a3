"""The records of a source as its files hold them, to be known again under another name.

A task picks columns and a target; what a record is must not depend on that, nor on the order of
rows or columns, nor on how a number is stored. A record of a table is all its columns; one of an
array is its row of inputs, as float32, without the label, which may be corrected later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.config.schema import Source
from lepton_fed.data.array_files import idx_inputs
from lepton_fed.data.builtin import BUILTIN, builtin_inputs
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.files import existing_file
from lepton_fed.data.idx import read_idx
from lepton_fed.data.npz import read_npz
from lepton_fed.data.table_files import csv_records

__all__ = ["source_rows"]


def source_rows(source: Source, read: Callable[[], Dataset]) -> Iterator[bytes]:
    """Yield each record of a source, equal bytes for equal records.

    Args:
        source: Reader, path and arguments, as the owner's conf gives them.
        read: Reads the rows under a task's contract. It is asked where the reader is a plug-in:
            only the reader knows its source then, and the task's choice of columns does count.

    Raises:
        LeptonError: The source cannot be read.
    """
    arguments = source.arguments
    if source.reader == "csv":
        for record in csv_records(source.path, str(arguments.get("delimiter", ","))):
            fields = sorted((name, _number_or_word(word)) for name, word in record.items())
            yield json.dumps(fields, separators=(",", ":")).encode()
    elif source.reader == "npz":
        name = str(arguments.get("inputs", "inputs"))
        yield from _of_array(read_npz(existing_file(source.path), [name])[0])
    elif source.reader == "idx":
        file: Path = idx_inputs(source.path, str(arguments.get("images", "")))
        yield from _of_array(read_idx(file))
    elif source.reader in BUILTIN:
        yield from _of_array(builtin_inputs(source.reader))
    else:
        yield from _of_array(read().inputs)


def _of_array(inputs: npt.NDArray[np.generic]) -> Iterator[bytes]:
    for row in inputs:
        yield _canonical(np.asarray(row))


def _canonical(row: npt.NDArray[np.generic]) -> bytes:
    """Return a row's bytes: of numbers as little-endian float32, with one zero and one NaN."""
    if row.dtype.kind not in "fiub":
        return row.tobytes()
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = row.astype("<f4").reshape(-1) + np.float32(0)  # minus zero becomes zero
    numbers[np.isnan(numbers)] = np.float32(np.nan)
    return numbers.astype("<f4").tobytes()


def _number_or_word(word: str) -> str:
    """Return a number in one spelling: 1, 1.0 and 1e0 are the same value."""
    try:
        return repr(float(word) + 0.0)
    except ValueError:
        return word

"""The reader of tables in text files (CSV)."""

from __future__ import annotations

import csv
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.contract import check, target_dtype
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.files import existing_file, unreadable
from lepton_fed.data.findings import Findings, Places, nearest
from lepton_fed.errors import DataError, Problem, TaskError, quoted

__all__ = ["csv_file", "csv_records"]

# What people put between fields, and how a conf says it.
_DELIMITERS = {";": '";"', "\t": '"\\t"', "|": '"|"', ",": '","'}
_MISSING = ("", "NA", "NaN", "nan", "null")
# Rows parsed at a time: the text of a row takes some 20 times the memory of its numbers.
_CHUNK_ROWS = 4096


def csv_file(
    contract: DataContract,
    path: str,
    with_target: bool,
    *,
    delimiter: str = ",",
    missing: Sequence[str] = _MISSING,
) -> Dataset:
    """Read a table from a text file with one header row.

    Columns are found by name; others in the file are ignored. Fields may be quoted, white space
    around a value does not count, and blank lines are skipped. Numbers are written with a decimal
    point. The file is UTF-8; a byte order mark is tolerated.

    Args:
        contract: What the rows must look like; a table.
        path: The file.
        with_target: Whether the target's column is read.
        delimiter: The character between two fields.
        missing: Words that stand for a missing number.

    Returns:
        The rows, as :class:`Dataset` describes them.

    Raises:
        DataError: The file cannot be read or does not fit the contract; every kind of misfit in
            every column is listed, with the line where it is first met.
        TaskError: An argument is wrong.
    """
    if len(delimiter) != 1 or delimiter in '"\r\n ':
        raise TaskError(
            Problem(
                "LF3104",
                f"{quoted(delimiter)} cannot stand between two fields",
                key="arguments.delimiter",
                remedy="give one character, such as , or ; or a tab",
            )
        )
    if contract.kind != "table":
        raise DataError(
            Problem(
                "LF2020",
                "a text file holds a table; the contract asks for images",
                where=path,
                remedy="use the npz or idx reader",
            )
        )
    file = existing_file(path)
    try:
        # utf-8-sig takes a byte order mark away, where there is one.
        with file.open(encoding="utf-8-sig", newline="") as stream:
            records = _records(stream, delimiter, path)
            return _parse(records, contract, with_target, frozenset(missing), path)
    except UnicodeDecodeError as error:
        raise DataError(
            Problem(
                "LF2004",
                "the text is not UTF-8",
                where=f"{path} line {_undecodable_line(file)}",
                remedy="save the file as UTF-8",
            )
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def csv_records(path: str, delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Yield each record of a table whole: every column of the file, whatever a contract names.

    Args:
        path: The file.
        delimiter: The character between two fields.

    Yields:
        Values by the name of their column, as they are written but for white space around them.

    Raises:
        DataError: The file cannot be read, or a record is not well formed.
    """
    file = existing_file(path)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            records = _records(stream, delimiter, path)
            _, header = next(records, (0, []))
            names = [name.strip() for name in header]
            for _, fields in records:
                yield dict(zip(names, (field.strip() for field in fields), strict=False))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def _parse(
    records: Iterator[tuple[int, list[str]]],
    contract: DataContract,
    with_target: bool,
    missing: frozenset[str],
    where: str,
) -> Dataset:
    findings = Findings(where)
    cells = _Cells(missing, findings)
    columns, target = contract.columns, contract.target
    _, header = next(records, (0, []))
    if not header:
        raise DataError(Problem("LF2003", "the file holds nothing but blank lines", where=where))
    header = [name.strip() for name in header]
    _refuse_one_column(header, {*(column.name for column in columns), target.name}, where)
    places = _locate(header, [column.name for column in columns], "LF2008", findings)
    if with_target:
        places += _locate(header, [target.name], "LF2009", findings)
    findings.refuse()
    inputs = [np.empty((0, len(columns)), np.float32)]
    targets = [np.empty(0, target_dtype(target))]
    lines = array("q")
    for numbers, fields in _chunks(records, len(header), findings):
        block = np.empty((len(numbers), len(columns)), np.float32)
        for position, column in enumerate(columns):
            block[:, position] = cells.inputs(fields[places[position]], column, numbers)
        inputs.append(block)
        if with_target:
            targets.append(cells.targets(fields[places[-1]], target, numbers))
        lines.extend(numbers)
    findings.refuse()
    dataset = Dataset(np.concatenate(inputs), np.concatenate(targets))
    # Checked here as well as by the caller: only here are the lines known.
    check(dataset, contract, where=where, with_target=with_target, lines=lines)
    return dataset


class _Cells:
    """Turns one column of text into numbers, and notes the cells that are none.

    Args:
        missing: Words that stand for a missing number.
        findings: Takes what is wrong.
    """

    def __init__(self, missing: frozenset[str], findings: Findings) -> None:
        self._missing = missing
        self._findings = findings

    def inputs(
        self, cells: Sequence[str], column: Column, lines: Sequence[int]
    ) -> npt.NDArray[np.generic]:
        """Return the values of an input column; a missing number is NaN."""
        if column.kind == "number":
            return self._numbers(cells, column.name, lines)
        return self._codes(cells, column.values, column.name, "LF2011", "category", lines)

    def targets(
        self, cells: Sequence[str], target: Target, lines: Sequence[int]
    ) -> npt.NDArray[np.generic]:
        """Return the values of the target column; a missing number is NaN."""
        if target.kind == "number":
            return self._numbers(cells, target.name, lines)
        return self._codes(cells, target.classes, target.name, "LF2012", "class", lines)

    def _numbers(
        self, cells: Sequence[str], name: str, lines: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        try:
            values = np.array(list(map(float, cells)))
        except ValueError:
            plain = False
        else:
            # float() also takes "nan" and "1_000"; those need a closer look.
            plain = not np.isnan(values).any() and "_" not in "".join(cells)
        if not plain:
            values = np.array(
                [
                    self._number(cell.strip(), name, line)
                    for cell, line in zip(cells, lines, strict=True)
                ]
            )
        with np.errstate(over="ignore"):  # what overflows is infinite, which the check refuses
            return values.astype(np.float32)

    def _number(self, cell: str, name: str, line: int) -> float:
        if cell in self._missing:
            return np.nan
        try:
            value = float(cell)
        except ValueError:
            value = np.nan
        if np.isnan(value) or "_" in cell:
            self._findings.note(
                "LF2010",
                f"{quoted(cell)} is not a number",
                remedy="write numbers with a decimal point; list words for missing ones under the "
                "reader's argument `missing`",
                column=name,
                places=Places([line]).of([0]),
            )
        return value

    def _codes(
        self,
        cells: Sequence[str],
        words: Sequence[str],
        name: str,
        code: str,
        noun: str,
        lines: Sequence[int],
    ) -> npt.NDArray[np.int64]:
        known: Mapping[str, int] = {word: position for position, word in enumerate(words)}
        found = np.array([known.get(cell, -1) for cell in cells], dtype=np.int64)
        for row in np.flatnonzero(found < 0).tolist():
            word = cells[row].strip()
            if word in known:
                found[row] = known[word]
                continue
            self._findings.note(
                code,
                f"{quoted(word)} is not a {noun} of the contract",
                remedy=nearest(word, words),
                column=name,
                places=Places(lines).of([row]),
            )
        return found


def _records(stream: TextIO, delimiter: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of every record that is not a blank line."""
    table = csv.reader(stream, delimiter=delimiter, strict=True)
    last = 0
    try:
        for row in table:
            line, last = last + 1, table.line_num
            if row:
                yield line, row
    except csv.Error as error:
        raise DataError(
            Problem(
                "LF2005",
                f"the record is not well formed: {error}",
                where=f"{where} line {last + 1}",
                remedy="every quoted field ends with a quote; a quote within is written twice",
            )
        ) from error


def _refuse_one_column(header: Sequence[str], wanted: Set[str], where: str) -> None:
    """Refuse a header that another delimiter would split: every column would be missing."""
    if len(header) > 1 or header[0] in wanted:
        return
    sign = max(_DELIMITERS, key=header[0].count)
    if sign in header[0]:
        raise DataError(
            Problem(
                "LF2008",
                f"the header is one column, {quoted(header[0])}",
                where=where,
                key="arguments.delimiter",
                remedy=f"set the reader's argument `delimiter` to {_DELIMITERS[sign]}",
            )
        )


def _locate(
    header: Sequence[str], names: Sequence[str], code: str, findings: Findings
) -> list[int]:
    """Return the places of columns in the file, and note those that are not there."""
    counts = Counter(header)
    for name in names:
        if not counts[name]:
            findings.note(
                code,
                f"the file has no column {quoted(name)}",
                column=name,
                remedy=nearest(name, header),
            )
        elif counts[name] > 1:
            findings.note(
                "LF2006",
                f"the header names {quoted(name)} {counts[name]} times",
                column=name,
                remedy="give each column a name of its own",
            )
    return [header.index(name) if name in counts else -1 for name in names]


def _chunks(
    records: Iterator[tuple[int, list[str]]], width: int, findings: Findings
) -> Iterator[tuple[list[int], list[tuple[str, ...]]]]:
    """Yield the lines and the columns of some thousand rows at a time."""
    lines: list[int] = []
    rows: list[list[str]] = []
    for line, row in records:
        if len(row) != width:
            findings.note(
                "LF2007",
                f"the row has {len(row)} fields, the header has {width}",
                remedy="quote a field that holds the delimiter; check the reader's `delimiter`",
                places=Places([line]).of([0]),
            )
            continue
        lines.append(line)
        rows.append(row)
        if len(rows) == _CHUNK_ROWS:
            yield lines, list(zip(*rows, strict=True))
            lines, rows = [], []
    if rows:
        yield lines, list(zip(*rows, strict=True))


def _undecodable_line(file: Path) -> int:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1

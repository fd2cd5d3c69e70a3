"""A site's own rows: read once, split as in a simulation, and named for the ledger."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ClientConf, Source
from lepton_fed.core.digests import digest_of
from lepton_fed.core.seeds import generator
from lepton_fed.core.task import DataContract
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.files import unreadable
from lepton_fed.data.partitioners import split_held_out
from lepton_fed.data.read import read

__all__ = ["OwnRows", "source_digest"]

_log = logging.getLogger("lepton_fed.site")


class OwnRows:
    """The rows of a site, kept over rounds and runs.

    Args:
        conf: The site's conf.
    """

    def __init__(self, conf: ClientConf) -> None:
        self._conf = conf
        self._contract = ""
        self._rows: Dataset | None = None
        self._identity = ""

    @property
    def identity(self) -> str:
        """Return what the ledger knows the content by; see :func:`source_digest`.

        Raises:
            DataError: LF2001 or such, a file cannot be read.
        """
        if not self._identity:
            self._identity = source_digest(self._conf.source)
        return self._identity

    def read(self, contract: DataContract) -> Dataset:
        """Return all rows; read again only under another contract.

        Args:
            contract: What the rows must look like.

        Raises:
            LeptonError: They cannot be read, or do not fit.
        """
        wanted = digest_of("lepton-fed contract 1", contract)
        if self._rows is None or self._contract != wanted:
            self._rows = None  # two data sets at once might not fit into memory
            self._rows = read(self._conf.source, contract, key="source")
            self._contract = wanted
            _log.info("data.read rows=%s", len(self._rows))
        return self._rows

    def split(self, agreement: Agreement) -> tuple[Dataset, Dataset]:
        """Return the rows to train on and those held out: what a simulated site would hold.

        Args:
            agreement: The run; its seed decides.

        Raises:
            LeptonError: The rows cannot be read, or do not fit.
        """
        rows = self.read(agreement.task.data)
        training, held_out = split_held_out(
            np.arange(len(rows)),
            self._conf.held_out,
            generator(agreement.seed, "held-out", site=self._conf.name),
            rows.targets,
        )
        return rows.take(training), rows.take(held_out)


def source_digest(source: Source) -> str:
    """Return the digest of what the owner's conf names, file contents included.

    Each entry of the ledger carries it, and rows are looked at again when it is another. Nothing
    that the coordinator picks is in it: neither the seed, which splits the rows, nor the contract,
    which picks columns.

    Args:
        source: Reader, path and arguments.

    Raises:
        DataError: A file cannot be read.
    """
    files: list[list[str]] = []
    path = Path(source.path)
    try:
        if source.path and path.exists():
            for file in [path] if path.is_file() else _files(path):
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
                name = "" if file == path else file.relative_to(path).as_posix()
                files.append([name, content])
    except OSError as error:
        raise unreadable(source.path, error) from error
    # The path of files that were moved may change, what is in them may not.
    words = "" if files else source.path
    return digest_of(
        "lepton-fed source 1",
        {"reader": source.reader, "path": words, "arguments": source.arguments, "files": files},
    )


def _files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(here, name) for name in sorted(names))

"""From a source in the conf to rows that fit the contract."""

from __future__ import annotations

from lepton_fed.config import plugins
from lepton_fed.config.schema import Source
from lepton_fed.core.task import DataContract
from lepton_fed.data.contract import check
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.files import unreadable
from lepton_fed.data.findings import under
from lepton_fed.errors import DataError, Problem

__all__ = ["read"]


def read(
    source: Source,
    contract: DataContract,
    *,
    with_target: bool = True,
    key: str = "sites.source",
) -> Dataset:
    """Read rows in place and hold them against the contract.

    Nothing is written, kept or sent. What a reader hands out is not trusted: it is checked here,
    whoever wrote the reader.

    Args:
        source: Reader, path and arguments, as the conf gives them.
        contract: What the rows must look like; one that a valid conf holds.
        with_target: Whether the rows must have their targets; False for prediction.
        key: Conf key of the source, for errors.

    Returns:
        The rows; without targets, ``targets`` has length 0.

    Raises:
        DataError: The rows cannot be read or do not fit the contract.
        TaskError: An argument is wrong.
        ConfError: No reader of that name is installed, or it does not take these arguments.
    """
    where = source.path or f"reader {source.reader}"
    try:
        with under(key):
            dataset = plugins.call(
                "readers",
                source.reader,
                source.arguments,
                key=f"{key}.arguments" if key else "arguments",
                contract=contract,
                path=source.path,
                with_target=with_target,
            )
    except OSError as error:  # a reader that is not ours need not word it itself
        raise unreadable(where, error) from error
    if not isinstance(dataset, Dataset):
        raise DataError(
            Problem(
                "LF2021",
                f"the reader {source.reader} returned a {type(dataset).__name__}, not a Dataset",
                where=where,
                key=key,
                remedy="tell the author of the reader",
            )
        )
    check(dataset, contract, where=where, with_target=with_target)
    return dataset

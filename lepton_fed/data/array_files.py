"""Readers of array files: NumPy archives, and the IDX files of the MNIST family.

Which element types are taken, and what becomes of them:

=========  ==========================================================================
contract   taken
=========  ==========================================================================
uint8      uint8 only: floats of 0..1 would turn to zeros without a word
float32    float32; float16 and float64 (rounded; refused if a number overflows);
           booleans and integers up to 2**24, which float32 holds exactly
classes    integers (codes), booleans, or words (names of classes)
number     as float32 above
=========  ==========================================================================

Byte order never matters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.core.task import DataContract, Target
from lepton_fed.data.contract import target_dtype
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.files import existing_file
from lepton_fed.data.findings import Findings, Places, nearest
from lepton_fed.data.idx import read_idx
from lepton_fed.data.npz import read_npz
from lepton_fed.errors import Problem, TaskError, quoted

__all__ = ["idx_files", "idx_inputs", "npz_file"]

_EXACT_INTEGERS = 1 << 24  # float32 holds every whole number up to here
_IMAGES = "train-images-idx3-ubyte"

Array = npt.NDArray[np.generic]


def npz_file(
    contract: DataContract, path: str, with_target: bool, *, inputs: str = "inputs"
) -> Dataset:
    """Read a NumPy archive (``.npz``).

    Args:
        contract: What the rows must look like; the target's array is named by ``target.name``.
        path: The archive.
        with_target: Whether targets are read.
        inputs: Name of the array of inputs, ``[rows, *example_shape]``. In a table, columns stand
            in the contract's order, categories as codes, and a missing number is NaN.

    Returns:
        The rows, as :class:`Dataset` describes them.

    Raises:
        DataError: The archive cannot be read, or an array cannot be taken as the contract's type.
    """
    file = existing_file(path)
    names = [inputs, contract.target.name] if with_target else [inputs]
    arrays = read_npz(file, names)
    return _dataset(arrays, contract, str(file))


def idx_files(
    contract: DataContract, path: str, with_target: bool, *, images: str = "", labels: str = ""
) -> Dataset:
    """Read a pair of IDX files, plain or gzipped.

    Images without a channel axis get one: ``[n, h, w]`` becomes ``[n, 1, h, w]``.

    Args:
        contract: What the rows must look like.
        path: The file of images, or the folder that holds both files.
        with_target: Whether the labels are read.
        images: Name of the file of images in the folder; by default ``train-images-idx3-ubyte``.
            Where a name does not exist, the same name with ``.gz`` is tried.
        labels: Name of the file of labels, beside the images; by default the images' own name with
            ``images`` and ``idx3`` turned into ``labels`` and ``idx1``.

    Returns:
        The rows, as :class:`Dataset` describes them.

    Raises:
        DataError: A file is missing, is not IDX, or cannot be taken as the contract's type.
        TaskError: The arguments do not say which files are meant.
    """
    inputs_file = idx_inputs(path, images)
    arrays = [read_idx(inputs_file)]
    if contract.kind == "image" and arrays[0].ndim == 3:
        arrays[0] = arrays[0][:, np.newaxis]
    if with_target:
        arrays.append(read_idx(_labels_file(inputs_file, labels)))
    return _dataset(arrays, contract, str(inputs_file))


def idx_inputs(path: str, images: str = "") -> Path:
    """Return the file of images that :func:`idx_files` reads; arguments and errors as there."""
    given = Path(path).expanduser()
    if path and given.is_dir():
        return _in_folder(given, images or _IMAGES)
    if images:
        raise TaskError(
            Problem(
                "LF3104",
                f"{quoted(images)} is given although the path is a file, not a folder",
                key="arguments.images",
            )
        )
    return existing_file(path)


def _in_folder(folder: Path, name: str) -> Path:
    plain, gzipped = folder / name, folder / f"{name}.gz"
    return existing_file(gzipped if gzipped.exists() and not plain.exists() else plain)


def _labels_file(images: Path, name: str) -> Path:
    if name:
        return _in_folder(images.parent, name)
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    if name == images.name.removesuffix(".gz"):
        raise TaskError(
            Problem(
                "LF3103",
                f"the name {quoted(name)} does not tell the name of the labels",
                key="arguments.labels",
                remedy="give the name of the file of labels",
            )
        )
    return _in_folder(images.parent, name)


def _dataset(arrays: list[Array], contract: DataContract, where: str) -> Dataset:
    """Turn the array of inputs, and of targets where it was read, into a data set."""
    findings = Findings(where)
    inputs = _cast(arrays[0], np.dtype(contract.dtype), "inputs", findings)
    targets: Array = np.empty(0, dtype=target_dtype(contract.target))
    if len(arrays) > 1:
        targets = _targets(arrays[1], contract.target, findings)
    findings.refuse()
    return Dataset(inputs, targets)


def _targets(array: Array, target: Target, findings: Findings) -> Array:
    if target.kind == "number":
        return _cast(array, np.dtype(np.float32), target.name, findings)
    if array.dtype.kind in "US" and _is_text(array):
        return _codes(array, target, findings)
    if array.dtype.kind not in "iub" or (array.size and int(array.max()) > _EXACT_INTEGERS):
        _refuse_type(array, "codes or names of classes", target.name, findings)
        return np.empty(array.shape, dtype=np.int64)
    return array.astype(np.int64)


def _is_text(words: Array) -> bool:
    """Return whether every character of an array of words exists."""
    if words.dtype.kind == "S" or not words.nbytes:
        return True
    native = words.astype(words.dtype.newbyteorder("="), order="C", copy=False)
    return int(native.reshape(-1).view(np.uint32).max()) <= sys.maxunicode


def _codes(words: Array, target: Target, findings: Findings) -> Array:
    """Return the codes of class names."""
    known = {name: code for code, name in enumerate(target.classes)}
    distinct, places = np.unique(words, return_inverse=True)
    names = [
        word.decode("utf-8", "backslashreplace") if isinstance(word, bytes) else str(word)
        for word in distinct
    ]
    codes = np.array([known.get(name, -1) for name in names], dtype=np.int64)
    found = codes[places].reshape(words.shape)
    if words.ndim == 1 and (found < 0).any():
        first = names[int(places[np.argmax(found < 0)])]
        findings.note_rows(
            "LF2012",
            found < 0,
            lambda row: f"{quoted(first)} is not a class of the contract",
            places=Places(),
            remedy=nearest(first, known),
            column=target.name,
        )
    return found


def _cast(array: Array, wanted: np.dtype[np.generic], name: str, findings: Findings) -> Array:
    """Return ``array`` as ``wanted`` where no value changes its meaning; note what stands against.

    Args:
        array: Any shape.
        wanted: uint8 or float32, in the machine's byte order.
        name: Name of the array, for the error.
        findings: Takes what is wrong.
    """
    if array.dtype.newbyteorder("=") == wanted:
        return array.astype(wanted, copy=False)
    kind = array.dtype.kind
    if wanted == np.float32 and kind in "fiub":
        if kind == "f":
            # What overflows becomes infinite, which the check refuses.
            with np.errstate(over="ignore", invalid="ignore"):
                return array.astype(wanted)
        if not array.size or (
            int(array.max()) <= _EXACT_INTEGERS and int(array.min()) >= -_EXACT_INTEGERS
        ):
            return array.astype(wanted)
    _refuse_type(array, str(wanted), name, findings)
    return np.empty(array.shape, dtype=wanted)


def _refuse_type(array: Array, wanted: str, name: str, findings: Findings) -> None:
    held = f"{array.dtype}"
    if array.dtype.kind in "iu" and array.size:
        held += f" between {array.min()} and {array.max()}"
    findings.note(
        "LF2031",
        f"the array holds {held}; the contract needs {wanted}",
        column=name,
        remedy="convert it where it is written, so that no value changes unnoticed",
    )

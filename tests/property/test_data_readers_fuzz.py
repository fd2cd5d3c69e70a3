"""Whatever bytes a file holds, a reader gives rows that fit the contract, or a DataError."""

import gzip
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.array_files import idx_files, npz_file
from lepton_fed.data.contract import check
from lepton_fed.data.table_files import csv_file
from lepton_fed.errors import DataError

BYTES = DataContract("image", [1, 2, 2], "uint8", target=Target(classes=["a", "b"]))
FLOATS = DataContract("image", [1, 2, 2], target=Target("number"))
TABLE = DataContract(
    columns=[Column("age"), Column("ward", kind="category", values=["n", "s"])],
    target=Target(classes=["a", "b"]),
)


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


READERS = {"csv": csv_file, "npz": npz_file, "idx": idx_files}
IMAGES = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
IDX = b"\0\0\x08\x03\0\0\0\x03\0\0\0\x02\0\0\0\x02" + IMAGES.tobytes()
SAMPLES = {
    "csv": [
        b'age,ward,label\n1,n,a\n2.5,"s",b\nNA, n,a\n',
        "\ufeffage;ward;label\r\n1;n;a\r\n".encode(),
    ],
    "npz": [
        npz(inputs=IMAGES, label=np.array([0, 1, 0])),
        npz(inputs=np.ones((3, 2)), label=np.array(["a", "b", "a"])),
    ],
    "idx": [IDX, gzip.compress(IDX, mtime=0)],
}


def changed(data, sample):
    """Return the sample with bytes replaced, cut out or put in."""
    content = bytearray(sample)
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.integers(0, 6))
        content[start:end] = data.draw(st.binary(max_size=6))
    return bytes(content)


def with_changed_members(data, sample):
    """Return an archive that is whole, of members that are not."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sample)) as before, zipfile.ZipFile(content, "w") as after:
        for name in before.namelist():
            after.writestr(name, changed(data, before.read(name)))
    return content.getvalue()


@pytest.mark.parametrize("reader", SAMPLES)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_bytes_give_valid_rows_or_a_data_error(reader, data, tmp_path_factory):
    sample = data.draw(st.sampled_from(SAMPLES[reader]))
    kinds = [lambda: data.draw(st.binary(max_size=200)), lambda: changed(data, sample)]
    if reader == "npz":
        kinds.append(lambda: with_changed_members(data, sample))
    file = tmp_path_factory.getbasetemp() / f"fuzz-{reader}"
    file.write_bytes(data.draw(st.sampled_from(kinds))())
    arguments = {"labels": "fuzz-labels"} if reader == "idx" else {}
    (file.parent / "fuzz-labels").write_bytes(b"\0\0\x08\x01\0\0\0\x03\0\1\0")
    for contract in (BYTES, FLOATS, TABLE):
        for with_target in (True, False):
            try:
                dataset = READERS[reader](contract, str(file), with_target, **arguments)
                check(dataset, contract, where=str(file), with_target=with_target)
            except DataError as error:
                problems = error.problems
            else:
                problems = ()
                assert dataset.inputs.shape[1:] == contract.example_shape
                assert dataset.labelled == with_target
            assert all(problem.code.startswith("LF20") for problem in problems)
            assert all(problem.what.isprintable() for problem in problems)

"""The IDX reader, on files that each test writes."""

import gzip
import struct

import numpy as np
import pytest

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.array_files import idx_files
from lepton_fed.data.contract import check
from lepton_fed.errors import DataError, TaskError

BYTES = DataContract("image", [1, 2, 3], "uint8", target=Target(classes=["a", "b"]))
FLOATS = DataContract("image", [1, 2, 3], target=Target(classes=["a", "b"]))
IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
LABELS = np.array([0, 1, 1, 0], np.uint8)

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    big_endian = array.dtype.newbyteorder(">")
    code = CODES[f"{array.dtype.kind}{array.dtype.itemsize}"]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(big_endian).tobytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


def problems_of(path, contract=BYTES, with_target=True, **arguments):
    with pytest.raises(DataError) as caught:
        idx_files(contract, str(path), with_target, **arguments)
    return caught.value.problems


def test_a_folder_is_read_and_images_get_a_channel(folder):
    dataset = idx_files(BYTES, str(folder), True)
    check(dataset, BYTES, where="")
    assert dataset.inputs.shape == (4, 1, 2, 3)
    assert dataset.inputs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.inputs[:, 0], IMAGES)
    assert dataset.targets.tolist() == [0, 1, 1, 0]
    assert dataset.inputs.flags.writeable


def test_the_path_of_the_images_is_enough(folder):
    dataset = idx_files(FLOATS, str(folder / "train-images-idx3-ubyte"), True)
    assert dataset.inputs.dtype == np.float32
    assert dataset.targets.tolist() == [0, 1, 1, 0]


def test_other_names_can_be_given(folder):
    (folder / "x").write_bytes(idx(IMAGES[:1]))
    (folder / "y").write_bytes(idx(LABELS[1:2]))
    for path, arguments in (
        (folder, {"images": "x", "labels": "y"}),
        (folder / "x", {"labels": "y"}),
    ):
        dataset = idx_files(BYTES, str(path), True, **arguments)
        assert (len(dataset), dataset.targets.tolist()) == (1, [1])


def test_gzipped_files_are_read_whatever_their_name(folder):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        content = gzip.compress((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(content)
    assert len(idx_files(BYTES, str(folder), True)) == 4
    assert len(idx_files(BYTES, str(folder / "train-images-idx3-ubyte.gz"), True)) == 4
    (folder / "train-images-idx3-ubyte").write_bytes(gzip.compress(idx(IMAGES)))
    assert len(idx_files(BYTES, str(folder), True)) == 4


def test_a_file_goes_before_its_gzipped_twin(folder):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"an old attempt")
    assert len(idx_files(BYTES, str(folder), True)) == 4


def test_without_target_no_labels_are_needed(folder):
    (folder / "train-labels-idx1-ubyte").unlink()
    dataset = idx_files(BYTES, str(folder), False)
    assert (len(dataset), dataset.targets.shape) == (4, (0,))
    (problem,) = problems_of(folder)
    assert (problem.code, problem.where) == ("LF2001", str(folder / "train-labels-idx1-ubyte"))


@pytest.mark.parametrize("dtype", CODES)
def test_every_type_is_read_big_endian(folder, dtype):
    values = np.array([[[1, 2, 3], [4, 5, 100]]]).astype(dtype)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(values))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.array([1], "i4")))
    dataset = idx_files(FLOATS, str(folder), True)
    assert dataset.inputs.dtype.isnative
    np.testing.assert_array_equal(dataset.inputs[0, 0], values[0].astype(np.float32))
    assert dataset.targets.tolist() == [1]


def test_big_endian_means_most_significant_byte_first(folder):
    content = b"\0\0\x0b\x03" + struct.pack(">3I", 1, 2, 3) + b"\x01\x02" * 6
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    assert idx_files(FLOATS, str(folder), False).inputs.max() == 0x0102


def test_images_with_channels_and_tables_keep_their_shape(folder):
    colour = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3)
    (folder / "c").write_bytes(idx(colour))
    contract = DataContract("image", [2, 2, 3], "uint8", target=Target(classes=["a", "b"]))
    assert idx_files(contract, str(folder), False, images="c").inputs.shape == (4, 2, 2, 3)
    (folder / "t").write_bytes(idx(np.ones((4, 2), "f4")))
    table = DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["a", "b"]))
    dataset = idx_files(table, str(folder), False, images="t")
    check(dataset, table, where="", with_target=False)


def test_labels_can_be_numbers(folder):
    contract = DataContract("image", [1, 2, 3], "uint8", target=Target("number"))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.array([0.5, 1, 2, 3], "f8")))
    assert idx_files(contract, str(folder), True).targets.tolist() == [0.5, 1, 2, 3]


WHOLE = idx(IMAGES)


def head(code, *shape):
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


DAMAGED = {
    "short magic": (b"\0\0", "LF2017"),
    "another format": (b"\x89PNG" + WHOLE[4:], "LF2017"),
    "wrong magic": (b"\0\1" + WHOLE[2:], "LF2017"),
    "unknown type": (b"\0\0\x0a\x03" + WHOLE[4:], "LF2017"),
    "no dimension": (b"\0\0\x08\x00" + WHOLE[4:], "LF2017"),
    "five dimensions": (b"\0\0\x08\x05" + WHOLE[4:], "LF2017"),
    "cut in its header": (WHOLE[:7], "LF2018"),
    "cut by a byte": (WHOLE[:-1], "LF2018"),
    "a byte too many": (WHOLE + b"\0", "LF2018"),
    "gzip, cut before": (gzip.compress(WHOLE[:-1]), "LF2018"),
    "gzip, a byte too many": (gzip.compress(WHOLE + b"\0"), "LF2018"),
    "gzip, cut after": (gzip.compress(WHOLE)[:-9], "LF2018"),
    "gzip, not deflate": (gzip.compress(WHOLE)[:10] + b"\xff" * 30, "LF2018"),
    "gzip, wrong checksum": (gzip.compress(WHOLE)[:-8] + bytes(8), "LF2018"),
    "beyond all sizes": (head(0x08, 2**32 - 1, 2**32 - 1, 2**32 - 1), "LF2018"),
    "no rows": (head(0x0E, 0, 2**32 - 1, 2**32 - 1), "LF2013"),
    "gzip bomb": (gzip.compress(head(0x08, 2**20, 2**10, 2**10)), "LF2019"),
}


@pytest.mark.parametrize(("content", "code"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(folder, content, code):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(content)
    (problem,) = problems_of(folder)
    assert (problem.code, problem.where) == (code, str(file))


def test_a_truncated_file_is_told_what_it_lacks(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(WHOLE[:-4])
    (problem,) = problems_of(folder)
    assert problem.what == "its header promises [4, 2, 3] elements, 24 bytes, but 20 follow"


def test_counts_that_differ_are_left_to_the_contract_check(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:3]))
    with pytest.raises(DataError) as caught:
        check(idx_files(BYTES, str(folder), True), BYTES, where="")
    assert caught.value.code == "LF2032"


def test_a_missing_or_empty_file_is_refused(folder):
    assert problems_of(folder / "none")[0].code == "LF2001"
    assert problems_of("")[0].code == "LF2001"
    (folder / "train-images-idx3-ubyte").write_bytes(b"")
    assert problems_of(folder)[0].code == "LF2003"


def test_arguments_that_do_not_say_which_files_are_meant_are_refused(folder):
    (folder / "x").write_bytes(idx(IMAGES))
    with pytest.raises(TaskError) as caught:
        idx_files(BYTES, str(folder / "x"), True, images="x")
    assert caught.value.problems[0].key == "arguments.images"
    with pytest.raises(TaskError) as caught:
        idx_files(BYTES, str(folder / "x"), True)
    assert caught.value.problems[0].key == "arguments.labels"

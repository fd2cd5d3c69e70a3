"""The NPZ reader, on archives that each test writes."""

import io
import zipfile

import numpy as np
import pytest

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data import files
from lepton_fed.data.array_files import npz_file
from lepton_fed.data.contract import check
from lepton_fed.errors import DataError

BYTES = DataContract("image", [1, 2, 2], "uint8", target=Target(classes=["a", "b"]))
FLOATS = DataContract("image", [1, 2, 2], target=Target(classes=["a", "b"]))
TABLE = DataContract(
    columns=[Column("age"), Column("ward", kind="category", values=["n", "s"])],
    target=Target("number", "price"),
)
IMAGES = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
LABELS = np.array([0, 1, 1])


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "rows.npz")


def problems_of(path, contract, with_target=True, **arguments):
    with pytest.raises(DataError) as caught:
        npz_file(contract, path, with_target, **arguments)
    return caught.value.problems


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_codes_are_read(path, save):
    save(path, inputs=IMAGES, label=LABELS)
    dataset = npz_file(BYTES, path, True)
    assert dataset.inputs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.inputs, IMAGES)
    assert dataset.targets.dtype == np.int64
    assert dataset.targets.tolist() == [0, 1, 1]
    assert dataset.inputs.flags.writeable


def test_arrays_are_found_by_the_names_given(path):
    np.savez(path, x=np.array([[1.5, 1]]), price=np.array([7]), inputs=np.zeros(9))
    dataset = npz_file(TABLE, path, True, inputs="x")
    assert dataset.inputs.tolist() == [[1.5, 1]]
    assert dataset.targets.tolist() == [7]
    assert dataset.targets.dtype == np.float32


def test_without_target_its_array_is_not_needed(path):
    np.savez(path, inputs=IMAGES)
    dataset = npz_file(BYTES, path, False)
    assert len(dataset) == 3
    assert dataset.targets.shape == (0,)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_order_in_memory_does_not_matter(path, order):
    numbers = np.array([[1, 0], [2, 1], [3, 0]], np.float32)
    np.savez(path, inputs=np.asarray(numbers, order=order), price=np.ones(3))
    np.testing.assert_array_equal(npz_file(TABLE, path, True).inputs, numbers)


@pytest.mark.parametrize(
    "dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "|u1", "|i1", "<i2", ">i4", "<i8", "<u8", "|b1"]
)
def test_every_type_that_float32_holds_is_taken(path, dtype):
    numbers = np.array([[1, 0], [0, 1]]).astype(dtype)
    np.savez(path, inputs=numbers, price=numbers[:, 0])
    dataset = npz_file(TABLE, path, True)
    assert dataset.inputs.dtype == np.float32
    assert dataset.inputs.dtype.isnative
    assert dataset.inputs.tolist() == [[1, 0], [0, 1]]


def test_doubles_are_rounded_and_missing_numbers_stay_missing(path):
    np.savez(path, inputs=np.array([[0.1, np.nan]]), price=np.array([0.1]))
    dataset = npz_file(TABLE, path, True)
    assert dataset.inputs[0, 0] == np.float32(0.1)
    assert np.isnan(dataset.inputs[0, 1])


def test_a_double_beyond_float32_becomes_infinite_and_is_refused(path):
    np.savez(path, inputs=np.array([[1, 0], [1e39, 0]]), price=np.ones(2))
    with pytest.raises(DataError) as caught:
        check(npz_file(TABLE, path, True), TABLE, where=path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF2035", f'{path} row 2 column "age"')


@pytest.mark.parametrize(
    "numbers",
    [
        np.array([[2**24 + 1, 0]]),
        np.array([[-(2**24) - 1, 0]]),
        np.array([[1j, 0]]),
        np.array([["1", "0"]]),
    ],
)
def test_what_would_change_in_float32_is_refused(path, numbers):
    np.savez(path, inputs=numbers, price=np.ones(1))
    (problem,) = problems_of(path, TABLE)
    assert (problem.code, problem.where) == ("LF2031", f'{path} column "inputs"')


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int8"])
def test_bytes_are_taken_as_bytes_only(path, dtype):
    np.savez(path, inputs=IMAGES.astype(dtype), label=LABELS)
    (problem,) = problems_of(path, BYTES)
    assert problem.code == "LF2031"
    assert "the contract needs uint8" in problem.what


@pytest.mark.parametrize("dtype", ["U", "S"])
def test_names_of_classes_are_turned_into_codes(path, dtype):
    np.savez(path, inputs=IMAGES, label=np.array(["b", "a", "b"], dtype=dtype))
    assert npz_file(BYTES, path, True).targets.tolist() == [1, 0, 1]


def test_an_unknown_name_of_a_class_is_named_with_its_row(path):
    contract = DataContract("image", [1, 2, 2], "uint8", target=Target(classes=["well", "ill"]))
    np.savez(path, inputs=IMAGES, label=np.array(["well", "wel", "wel"]))
    (problem,) = problems_of(path, contract)
    assert (problem.code, problem.where) == ("LF2012", f'{path} row 2 column "label"')
    assert problem.what == '"wel" is not a class of the contract (also at row 3)'
    assert problem.remedy == 'did you mean "well"?'


@pytest.mark.parametrize("labels", [np.zeros(3), np.full(3, 2**40), np.zeros(3, complex)])
def test_targets_that_are_no_codes_are_refused(path, labels):
    np.savez(path, inputs=IMAGES, label=labels)
    (problem,) = problems_of(path, BYTES)
    assert (problem.code, problem.where) == ("LF2031", f'{path} column "label"')


def test_missing_arrays_are_named_with_the_nearest(path):
    np.savez(path, input=IMAGES, labels=LABELS)
    inputs, label = problems_of(path, BYTES)
    assert (inputs.code, inputs.remedy) == ("LF2016", 'did you mean "input"?')
    assert (label.code, label.remedy) == ("LF2016", 'did you mean "labels"?')


def test_an_array_of_objects_is_refused_and_nothing_is_unpickled(path, tmp_path):
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.savez(path, inputs=np.array([Hostile()], dtype=object), label=LABELS)
    assert problems_of(path, BYTES)[0].code == "LF2015"
    assert not marker.exists()


UINT8 = "'descr': '|u1', 'fortran_order': False"


def member(header, data=b"", magic=b"\x93NUMPY\x01\x00"):
    text = header.encode()
    return magic + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        member(f"{{{UINT8}, 'shape': (3,)}}", b"123", magic=b"\x93NUMPY\x04\x00"),
        member(f"{{{UINT8}, 'shape': (4,)}}", b"123"),
        member(f"{{{UINT8}, 'shape': (2,)}}", b"123"),
        member(f"{{{UINT8}, 'shape': (-3,)}}", b"123"),
        member(f"{{{UINT8}, 'shape': (10**30,)}}", b"123"),
        member(f"{{{UINT8}, 'shape': 3}}", b"123"),
        member(f"{{{UINT8}}}", b"123"),
        member("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,)}", b"123"),
        member("{'descr': '|V1', 'fortran_order': False, 'shape': (3,)}", b"123"),
        member("{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}", b"123"),
        member("__import__('os')", b"123"),
        member("(" * 4000, b"123"),
        member(" " * 10_001, b"123"),
        member(f"{{{UINT8}, 'shape': (True,)}}", b"1"),
    ],
)
def test_a_member_that_is_no_array_is_refused(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", content)
    (problem,) = problems_of(path, BYTES, with_target=False)
    assert problem.code == "LF2014"


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (0, 10**18, 10**18, 1)])
def test_an_array_without_elements_is_refused(path, shape):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", member(f"{{{UINT8}, 'shape': {shape}}}"))
    assert problems_of(path, FLOATS, with_target=False)[0].code == "LF2013"


def test_characters_that_do_not_exist_are_refused(path):
    header = "{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}"
    with zipfile.ZipFile(path, "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, IMAGES[:1])
        archive.writestr("inputs.npy", buffer.getvalue())
        archive.writestr("label.npy", member(header, b"\xff\xff\xff\x7f"))
    assert problems_of(path, BYTES)[0].code == "LF2031"


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_refused(path, cut):
    np.savez_compressed(path, inputs=IMAGES, label=LABELS)
    with open(path, "rb+") as stream:
        content = stream.read()
        stream.truncate(int(len(content) * cut))
    (problem,) = problems_of(path, BYTES)
    assert (problem.code, problem.where) == ("LF2014", path)


def test_a_changed_byte_is_refused(path):
    np.savez(path, inputs=IMAGES, label=LABELS)
    with open(path, "rb") as stream:
        content = stream.read()
    assert content.count(IMAGES.tobytes()) == 1
    with open(path, "wb") as stream:
        stream.write(content.replace(IMAGES.tobytes(), bytes(12)))
    assert "CRC" in problems_of(path, BYTES)[0].what


def test_a_compression_that_numpy_never_writes_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("inputs.npy", b"")
    assert problems_of(path, BYTES, with_target=False)[0].code == "LF2014"


def test_a_bomb_is_refused_before_memory_is_taken(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.npy", bytes(1000))
        archive.filelist[0].file_size = 1 << 40  # what the archive claims when it is closed
    assert problems_of(path, BYTES, with_target=False)[0].code == "LF2019"


def test_large_content_passes_if_it_is_not_out_of_proportion(path, monkeypatch):
    monkeypatch.setattr(files, "_ALWAYS_ADMITTED_BYTES", 100)
    random = np.random.default_rng(0).integers(0, 256, (500, 1, 2, 2), dtype=np.uint8)
    np.savez_compressed(path, inputs=random)
    assert len(npz_file(BYTES, path, False)) == 500
    np.savez_compressed(path, inputs=np.zeros((100_000, 1, 2, 2), np.uint8))
    assert problems_of(path, BYTES, with_target=False)[0].code == "LF2019"


def test_a_shape_that_does_not_fit_is_left_to_the_contract_check(path):
    np.savez(path, inputs=IMAGES[:, 0], label=LABELS)
    with pytest.raises(DataError) as caught:
        check(npz_file(BYTES, path, True), BYTES, where=path)
    (problem,) = caught.value.problems
    assert problem.code == "LF2030"
    assert problem.what == "one example has shape [2, 2], the contract says [1, 2, 2]"

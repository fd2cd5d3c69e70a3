"""Records of a source: the same bytes for the same record, whatever a task makes of it."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from lepton_fed.config.schema import Source
from lepton_fed.data.builtin import BUILTIN
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.source_rows import source_rows
from lepton_fed.errors import DataError

TABLE = "age,name,score\n41,ann,1.50\n7,bob,nan\n"


def rows(source):
    def refuse():
        raise AssertionError("the task has nothing to do with it")

    return list(source_rows(source, refuse))


def table(tmp_path, text, **arguments):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return rows(Source("csv", str(path), arguments))


def archive(tmp_path, **arrays):
    path = tmp_path / "rows.npz"
    np.savez(path, **arrays)
    return path


def test_a_record_of_a_table_is_all_its_columns(tmp_path):
    one, two = table(tmp_path, TABLE)
    assert one != two
    assert table(tmp_path, TABLE.replace("1.50", "1.51"))[0] != one
    assert table(tmp_path, "age,name\n41,ann\n") != [one]


@pytest.mark.parametrize(
    "text",
    [
        "name,score,age\nbob,nan,7\nann,1.50,41\n",
        'age,name,score\n"41", ann ,1.5\n7.0,bob,NaN\n',
        "\ufeffage,name,score\n\n4.1e1,ann,1.5\n7,bob,nan\n",
    ],
)
def test_the_order_of_rows_and_columns_and_the_spelling_of_numbers_do_not_count(tmp_path, text):
    assert sorted(table(tmp_path, text)) == sorted(table(tmp_path, TABLE))


def test_a_table_may_have_another_delimiter(tmp_path):
    plain = table(tmp_path, TABLE)
    assert table(tmp_path, TABLE.replace(",", ";"), delimiter=";") == plain


def test_a_value_of_one_column_is_not_that_of_another(tmp_path):
    assert table(tmp_path, "a,b\n1,2\n") != table(tmp_path, "a,b\n2,1\n")
    assert table(tmp_path, 'a,b\n"1,2",\n') != table(tmp_path, 'a,b\n1,"2,"\n')


def test_a_table_that_is_not_there_or_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError) as caught:
        rows(Source("csv", str(tmp_path / "none.csv")))
    assert caught.value.code == "LF2001"
    (tmp_path / "bad.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(DataError):
        rows(Source("csv", str(tmp_path / "bad.csv")))


def test_a_record_of_an_array_is_its_inputs_as_float32(tmp_path):
    inputs = np.array([[0.5, np.nan], [-0.0, 3]])
    labels = np.array([0, 1])
    before = rows(Source("npz", str(archive(tmp_path, inputs=inputs, label=labels))))
    assert before == [b"\x00\x00\x00?\x00\x00\xc0\x7f", b"\x00\x00\x00\x00\x00\x00@@"]
    other = archive(tmp_path, x=inputs.astype(np.float32)[::-1] + 0.0, label=1 - labels)
    after = rows(Source("npz", str(other), {"inputs": "x"}))
    assert sorted(after) == sorted(before), "a label may be corrected later"


def test_words_in_an_array_are_taken_as_they_are(tmp_path):
    path = archive(tmp_path, inputs=np.array([["a"], ["b"]]))
    one, two = rows(Source("npz", str(path)))
    assert one != two


def test_images_of_an_idx_file_are_those_of_an_archive(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + images.tobytes()))
    archived = rows(Source("npz", str(archive(tmp_path, inputs=images[:, np.newaxis]))))
    assert rows(Source("idx", str(path))) == archived
    assert rows(Source("idx", str(tmp_path))) == archived


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_sets_have_all_their_rows(name):
    found = rows(Source(name))
    assert len(found) > 100
    assert len(set(found)) > 0.99 * len(found)


def test_rows_of_another_reader_are_those_that_it_hands_out():
    given = Dataset(np.ones((2, 3), np.float32), np.zeros(2, np.int64))
    found = list(source_rows(Source("warehouse"), lambda: given))
    assert found == [np.ones(3, "<f4").tobytes()] * 2

"""The CSV reader, on files that each test writes."""

import numpy as np
import pytest

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data import table_files
from lepton_fed.data.table_files import csv_file
from lepton_fed.errors import DataError, TaskError

CONTRACT = DataContract(
    columns=[
        Column("age", minimum=0, fill=50.0),
        Column("ward", kind="category", values=["north", "south"]),
        Column("dose"),
    ],
    target=Target(name="outcome", classes=["well", "ill"]),
)
HEAD = "dose,age,ward,outcome\n"
GOOD = "1,30,north,well\n"


@pytest.fixture
def file(tmp_path):
    def write(content, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def problems_of(path, contract=CONTRACT, with_target=True, **arguments):
    with pytest.raises(DataError) as caught:
        csv_file(contract, path, with_target, **arguments)
    return caught.value.problems


def test_columns_are_found_by_name_and_others_are_ignored(file):
    path = file("note,outcome,dose,ward,age\nhello,ill,1.5,south,30\n,well,-2e1,north,NA\n")
    dataset = csv_file(CONTRACT, path, True)
    np.testing.assert_array_equal(
        dataset.inputs, np.array([[30, 1, 1.5], [np.nan, 0, -20]], np.float32)
    )
    assert dataset.inputs.dtype == np.float32
    assert dataset.targets.tolist() == [1, 0]
    assert dataset.targets.dtype == np.int64


def test_the_file_is_left_as_it_was(file, tmp_path):
    path = file(HEAD + GOOD)
    csv_file(CONTRACT, path, True)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.csv"]
    assert (tmp_path / "rows.csv").read_text() == HEAD + GOOD


def test_without_target_its_column_is_not_needed(file):
    path = file("age,ward,dose\n30,north,1\n")
    dataset = csv_file(CONTRACT, path, False)
    assert dataset.inputs.tolist() == [[30, 0, 1]]
    assert dataset.targets.shape == (0,)
    assert dataset.targets.dtype == np.int64


def test_numbers_as_targets_are_read(file):
    contract = DataContract(columns=[Column("age")], target=Target("number", "price"))
    dataset = csv_file(contract, file("age,price\n1,2.5\n2,-3\n"), True)
    assert dataset.targets.dtype == np.float32
    assert dataset.targets.tolist() == [2.5, -3]


def test_byte_order_mark_quotes_blank_lines_spaces_and_crlf_are_tolerated(file):
    text = '\ufeff"age", ward,dose ,outcome\r\n\r\n 30 ,"south"," 1.5", ill \r\n"4",north,0,well'
    dataset = csv_file(CONTRACT, file(text), True)
    assert dataset.inputs.tolist() == [[30, 1, 1.5], [4, 0, 0]]
    assert dataset.targets.tolist() == [1, 0]


def test_the_delimiter_and_the_words_for_missing_can_be_given(file):
    path = file("age;ward;dose;outcome\n?;north;1;well\n")
    dataset = csv_file(CONTRACT, path, True, delimiter=";", missing=["?"])
    assert np.isnan(dataset.inputs[0, 0])
    (problem,) = problems_of(file("age;ward;dose;outcome\nNA;north;1;well\n"), delimiter=";",
                             missing=["?"])  # fmt: skip
    assert (problem.code, problem.what) == ("LF2010", '"NA" is not a number')


@pytest.mark.parametrize(
    ("given", "used", "shown"),
    [(",", ";", '";"'), (",", "\t", r'"\t"'), (",", "|", '"|"'), (";", ",", '","')],
)
@pytest.mark.parametrize("with_target", [True, False])
def test_another_delimiter_is_one_problem_that_names_the_argument(
    file, given, used, shown, with_target
):
    path = file(HEAD.replace(",", used) + GOOD.replace(",", used))
    (problem,) = problems_of(path, with_target=with_target, delimiter=given)
    assert (problem.code, problem.where) == ("LF2008", path)
    assert problem.key == "arguments.delimiter"
    assert problem.remedy == f"set the reader's argument `delimiter` to {shown}"


def test_one_column_whose_name_holds_a_delimiter_is_a_column(file):
    contract = DataContract(columns=[Column("a;b")], target=Target("number", "y"))
    assert csv_file(contract, file("a;b\n1\n"), False).inputs.tolist() == [[1]]


def test_one_column_that_no_delimiter_splits_is_a_wrong_column(file):
    codes = [problem.code for problem in problems_of(file("agee\n1\n"))]
    assert codes == ["LF2008", "LF2008", "LF2008", "LF2009"]


def test_a_word_for_missing_can_also_be_a_category(file):
    column = Column("ward", kind="category", values=["NA", "EU"])
    contract = DataContract(columns=[column], target=Target("number", "y"))
    assert csv_file(contract, file("ward,y\nNA,1\n"), True).inputs.tolist() == [[0]]


def test_rows_are_the_same_however_they_fall_into_chunks(file, monkeypatch):
    lines = [f"{n},{n % 7 or 'NA'},{'north' if n % 3 else ' south'},ill\n" for n in range(50)]
    path = file(HEAD + "".join(lines))
    whole = csv_file(CONTRACT, path, True)
    monkeypatch.setattr(table_files, "_CHUNK_ROWS", 7)
    pieces = csv_file(CONTRACT, path, True)
    assert len(whole) == 50
    assert whole.digest == pieces.digest


@pytest.mark.parametrize("text", ["abc", "1_000", "1,5", "0x10", "", "-", "1e", "nan"])
def test_what_is_no_number_is_named_with_line_and_column(file, text):
    contract = DataContract(columns=[Column("age")], target=Target("number", "y"))
    path = file(f'age,y\n1,1\n2,2\n"{text}",3\n')
    (problem,) = problems_of(path, contract, missing=[])
    assert problem.code == "LF2010"
    assert problem.where == f'{path} line 4 column "age"'
    assert problem.what == f'"{text}" is not a number'


@pytest.mark.parametrize("text", ["inf", "-Infinity", "1e39", "1e999"])
def test_an_infinite_number_is_named_with_line_and_column(file, text):
    (problem,) = problems_of(file(HEAD + GOOD + f"{text},30,north,well\n"))
    assert problem.code == "LF2035"
    assert problem.where.endswith('line 3 column "dose"')


def test_a_missing_number_without_a_fill_is_named_with_line_and_column(file):
    (problem,) = problems_of(file(HEAD + GOOD + ",30,north,well\n" + "NA,30,north,well\n"))
    assert problem.code == "LF2033"
    assert problem.where.endswith('line 3 column "dose"')
    assert problem.what.endswith("(also at line 4)")


def test_a_number_outside_its_bounds_is_named_with_line_and_column(file):
    (problem,) = problems_of(file(HEAD + "\n" + GOOD + "1,-3,north,well\n"))
    assert problem.code == "LF2036"
    assert problem.where.endswith('line 4 column "age"')
    assert problem.what.startswith("-3.0 is outside")


def test_unknown_words_are_named_with_the_nearest_known(file):
    path = file(HEAD + "1,30,noth,well\n" + "1,30,north,il\n" + "1,30,,well\n")
    category, label = problems_of(path)
    assert (category.code, category.where) == ("LF2011", f'{path} line 2 column "ward"')
    assert category.what == '"noth" is not a category of the contract (also at line 4)'
    assert category.remedy == 'did you mean "north"?'
    assert (label.code, label.where) == ("LF2012", f'{path} line 3 column "outcome"')
    assert label.remedy == 'did you mean "ill"?'


def test_lines_are_counted_through_quoted_line_breaks_and_blank_lines(file):
    rows = [
        '"two\nlines",1,30,north,well',
        "",
        '"three\nmore\nlines",?,1,north,ill',
        "x,?,1,north,ill",
    ]
    path = file("note,dose,age,ward,outcome\n" + "\n".join(rows))
    (problem,) = problems_of(path)
    assert problem.where.endswith('line 5 column "dose"')
    assert problem.what.endswith("(also at line 8)")


def test_missing_columns_are_named_with_the_nearest_in_the_file(file):
    path = file("Dose,age,wards,result\n1,30,north,well\n")
    dose, ward, outcome = sorted(problems_of(path), key=lambda problem: problem.what)
    assert (dose.code, dose.remedy) == ("LF2008", 'did you mean "Dose"?')
    assert (ward.code, ward.where) == ("LF2009", f'{path} column "outcome"')
    assert (outcome.code, outcome.remedy) == ("LF2008", 'did you mean "wards"?')


def test_a_column_named_twice_is_refused_if_it_is_needed(file):
    (problem,) = problems_of(file("dose,age,age,ward,outcome\n1,2,3,north,well\n"))
    assert (problem.code, problem.what) == ("LF2006", 'the header names "age" 2 times')
    unused = file("dose,age,x,x,ward,outcome\n1,2,3,4,north,well\n")
    assert len(csv_file(CONTRACT, unused, True)) == 1


def test_ragged_rows_are_named(file):
    (problem,) = problems_of(file(HEAD + GOOD + "1,2\n" + GOOD + "1,2,3,4,5\n"))
    assert problem.code == "LF2007"
    assert problem.where.endswith("line 3")
    assert problem.what == "the row has 2 fields, the header has 4 (also at line 5)"


def test_all_kinds_of_misfits_are_said_at_once(file):
    path = file(HEAD + "a,b,c,d\n" + "1\n")
    codes = [problem.code for problem in problems_of(path)]
    assert sorted(codes) == ["LF2007", "LF2010", "LF2010", "LF2011", "LF2012"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "LF2003"),
        (b"\n\n", "LF2003"),
        (HEAD.encode(), "LF2013"),
        (b'dose,age,ward,outcome\n1,"30,north,well\n', "LF2005"),
        (b'dose,age,ward,outcome\n1,"3"0,north,well\n', "LF2005"),
        ((HEAD + "1,30,north," + "x" * 200_000 + "\n").encode(), "LF2005"),
    ],
)
def test_a_file_without_rows_or_with_broken_quotes_is_refused(file, content, code):
    assert problems_of(file(content))[0].code == code


@pytest.mark.parametrize(
    ("content", "line"),
    [(HEAD.encode() + b"1,30,n\xf6rth,well\n", 2), (HEAD.encode("utf-16"), 1)],
)
def test_text_that_is_not_utf8_is_refused_with_its_line(file, content, line):
    (problem,) = problems_of(file(content))
    assert problem.code == "LF2004"
    assert problem.where.endswith(f"line {line}")


def test_text_that_is_not_utf8_is_found_far_into_a_file(file):
    rows = GOOD.encode() * 5000
    (problem,) = problems_of(file(HEAD.encode() + rows + b"\xff\n"))
    assert problem.where.endswith("line 5002")


def test_a_missing_file_a_folder_and_no_path_are_refused(file, tmp_path, monkeypatch):
    assert problems_of(str(tmp_path / "none.csv"))[0].code == "LF2001"
    assert problems_of(str(tmp_path))[0].code == "LF2002"
    assert problems_of("")[0].code == "LF2001"
    assert problems_of("a\0b")[0].code == "LF2002"
    monkeypatch.chdir(tmp_path)
    assert problems_of("none.csv")[0].remedy == f"relative paths start from {tmp_path}"


def test_an_image_is_no_table(file):
    contract = DataContract("image", [1, 2, 2], target=Target(classes=["a", "b"]))
    assert problems_of(file(HEAD + GOOD), contract)[0].code == "LF2020"


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n", " "])
def test_an_impossible_delimiter_is_refused(file, delimiter):
    with pytest.raises(TaskError) as caught:
        csv_file(CONTRACT, file(HEAD + GOOD), True, delimiter=delimiter)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF3104", "arguments.delimiter")

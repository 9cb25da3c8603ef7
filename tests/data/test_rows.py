"""What is read of rows without their pictures: forget sets, captions, paths; also of a million."""

import tracemalloc
from contextlib import contextmanager

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from siss_diffusers.data.captions import load_captions, same_captions
from siss_diffusers.data.forget_set import forget_rows_of
from siss_diffusers.data.images import Images
from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.sources import check_image_paths
from siss_diffusers.errors import UsageError
from tests.helpers.image_rows import embedded, flat, make_rows


MILLION = 1_000_000


@pytest.fixture(scope="module")
def million() -> datasets.Dataset:
    numbers = pa.array(np.arange(MILLION))
    text = pc.cast(numbers, pa.string())
    paths = pc.binary_join_element_wise("/data/images", text, "x.png", "/")
    columns = {
        "image": pa.StructArray.from_arrays([pa.nulls(MILLION, pa.binary()), paths], names=["bytes", "path"]),
        "text": pc.binary_join_element_wise("a  Picture of", pc.cast(pc.divide(numbers, 10), pa.string()), " "),
        "person": pc.binary_join_element_wise("person", text, "_"),
        "label": pc.bit_wise_and(numbers, 7),
        "forget": pc.equal(numbers, 777_777),
    }
    features = datasets.Features(
        image=datasets.Image(decode=False),
        text=datasets.Value("string"),
        person=datasets.Value("string"),
        label=datasets.ClassLabel(names=list("abcdefgh")),
        forget=datasets.Value("bool"),
    )
    table = pa.Table.from_batches(pa.table(columns).to_batches(max_chunksize=1_000))  # as `datasets` writes them
    return datasets.Dataset(table.cast(features.arrow_schema))


@contextmanager
def memory_below(bytes_per_row: float):
    """Of Python and numpy objects at a time: in a list, an integer takes 36 and a short string 60."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < bytes_per_row * MILLION


class TestRowsOfAMillion:
    def test_rows_to_forget_by_value(self, million):
        with memory_below(3):
            assert forget_rows_of(million, "image") == [777_777]
            found = forget_rows_of(million, "image", forget_column="person", forget_value="person_123456")
            assert found == [123_456]
        with memory_below(10):
            found = forget_rows_of(million, "image", forget_column="label", forget_value="c")
            assert len(found) == MILLION / 8 and found[:2] == [2, 10]

    def test_rows_to_forget_by_name(self, million):
        with memory_below(3):
            names = ["31/x.png", "999999/x.png"]
            assert forget_rows_of(million, "image", names, train_data_dir="/data/images") == [31, 999_999]

    def test_paths(self, million):
        with memory_below(3):
            check_image_paths(million, "image", "--train_data_dir", ["/data"])
            with pytest.raises(UsageError, match="lies outside"):
                check_image_paths(million, "image", "--train_data_dir", ["/data/images/1"])

    def test_captions(self, million):
        images = Images(million, "image", None, "--train_data_dir")
        rows = np.arange(MILLION)
        with memory_below(10):
            captions = load_captions(images, "text", rows)
            assert np.flatnonzero(same_captions(captions, [" A picture of 70 "])).tolist() == [*range(700, 710)]

    def test_order(self, million):
        """Three arrays of numbers, and the pages of digests that are written to, which is not seen here."""
        images = Images(million, "image", None, "--train_data_dir")
        images.digest = lambda row: row.to_bytes(16)
        with memory_below(3 * 8 + 16 + 3):
            order = KeepOrder(images, np.delete(np.arange(MILLION), 777_777), set(), seed=0)
            order.walk(640)
            assert order.counts() == {
                "keep": MILLION - 1,
                "duplicates_removed": 0,
                "near_duplicates_removed": 0,
                "checked": 640,
            }
            assert len({order[position] for position in range(640)}) == 640


@pytest.mark.parametrize(
    ("captions", "expected"),
    [(["a", "b"], ["a", "b"]), ([["a", "c"], ["b"]], ["a", "b"]), ([["a"], []], "1 of 2"), ([None, "b"], "1 of 2")],
)
def test_captions_are_strings_or_the_first_of_several(captions, expected):
    images = Images(embedded([flat(0), flat(1)]).add_column("text", captions), "image", None, "--train_data_dir")
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=f"{expected} images have no caption"):
            load_captions(images, "text")
    else:
        assert load_captions(images, "text").to_pylist() == expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([7, 42], ["7", "42"]),
        ([[1, 3], [2]], ["1", "2"]),
        ([2.0, 0.5], ["2.0", "0.5"]),
        ([True, False], ["true", "false"]),
        ([[["a"]], [["b"], ["c"]]], ["a", "b"]),
    ],
)
def test_captions_that_are_no_texts_are_as_they_are_written(captions, expected):
    images = Images(embedded([flat(0), flat(1)]).add_column("text", captions), "image", None, "--train_data_dir")
    assert load_captions(images, "text").to_pylist() == expected


def test_a_class_as_a_caption_is_its_name():
    rows = embedded([flat(0), flat(1), flat(2)]).add_column("text", [1, 0, 1])
    rows = rows.cast_column("text", datasets.ClassLabel(names=["a cat", "a dog"]))
    images = Images(rows, "image", None, "--train_data_dir")
    assert load_captions(images, "text").to_pylist() == ["a dog", "a cat", "a dog"]


def test_captions_that_are_structures_are_refused():
    rows = embedded([flat(0), flat(1)]).add_column("text", [{"a": "x"}, {"a": "y"}])
    with pytest.raises(UsageError, match=r"--caption_column 'text' holds objects \(a\)"):
        load_captions(Images(rows, "image", None, "--train_data_dir"), "text")


def test_rows_to_forget_by_name(tmp_path):
    files = ["a/x.png", "b/x.png", "b/y.png", "c\nd/z.png", "w x.png"]
    rows = make_rows([str(tmp_path / file) for file in files])

    def found(*names: str) -> list[int]:
        return forget_rows_of(rows, "image", list(names), train_data_dir=str(tmp_path))

    assert found("y.png") == [2] and found("b/x.png", "./a/x.png") == [0, 1] and found("z.png", "w x.png") == [3, 4]
    with pytest.raises(UsageError, match="x.png names 2 files of"):
        found("x.png")
    with pytest.raises(UsageError, match="c/y.png is not in"):
        found("c/y.png")


COLUMNS = {
    "age": [1, 3, None],
    "marked": [0, 1, None],
    "share": [0.5, 0.25, 0.5],
    "adult": [False, True, None],
    "name": ["x", None, "Y "],
    "word": ["Yes", "no", "TRUE"],
    "twins": ["Ann", "ANN", "bob"],
    "answer": ["y", "t", "n"],
    "advice": ["keep", "retain", "forget"],
}


def people() -> datasets.Dataset:
    rows = make_rows(["a", "b", "c"])
    for name, values in COLUMNS.items():
        rows = rows.add_column(name, values)
    return rows


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        *(
            ("age", "3", [1]),
            ("age", "3.0", [1]),
            ("age", "1", [0]),
            ("share", "0.5", [0, 2]),
            ("share", ".50", [0, 2]),
        ),
        *(("marked", "1", [1]), ("marked", "true", [1]), ("marked", "0", [0])),
        *(("adult", "True", [1]), ("adult", "true", [1]), ("adult", "1", [1]), ("adult", "no", [0])),
        *(("name", "x", [0]), ("name", "X", [0]), ("name", "y", [2]), ("name", "Y ", [2])),
        *(("word", "true", [0, 2]), ("word", "yes", [0, 2]), ("word", "no", [1])),
        *(("twins", "Ann", [0]), ("twins", "Bob", [2])),
        *(("answer", "y", [0]), ("answer", "Y", [0]), ("answer", "yes", [0, 1]), ("advice", "keep", [0])),
    ],
)
def test_rows_to_forget_by_value(column, value, expected):
    assert forget_rows_of(people(), "image", forget_column=column, forget_value=value) == expected


@pytest.mark.parametrize(
    ("column", "value", "type_and_example"),
    [
        *(
            ("age", "1.5", "int64 and holds 1, 3"),
            ("age", "true", "int64"),
            ("share", "x", "double and holds 0.5, 0.25"),
        ),
        *(("adult", "maybe", "bool and holds False, True"), ("name", "None", "string and holds 2 distinct values")),
        ("twins", "ann", "may mean 'ANN' or 'Ann'"),
    ],
)
def test_a_value_of_no_row_is_refused_with_an_example(column, value, type_and_example):
    with pytest.raises(UsageError) as refused:
        forget_rows_of(people(), "image", forget_column=column, forget_value=value)
    assert "--forget_value" in str(refused.value) and f"`{column}`" in str(refused.value)
    assert type_and_example in str(refused.value)


@pytest.mark.parametrize("value", ["somebody", "Ann smith, 4 Elm Street", "ann Smith, 4 Elm Street"])
def test_no_message_tells_a_text_of_the_column(value, caplog):
    """It may be a caption, and that of a memorized image. What was asked for may be told."""
    texts = ["Ann smith, 4 Elm Street", "yes", "Ann Smith, 4 Elm Street", "Ben Miller", None]
    rows = make_rows(list("abcde")).add_column("text", texts)
    messages = []
    try:
        forget_rows_of(rows, "image", forget_column="text", forget_value=value)
    except UsageError as error:
        messages.append(str(error))
    with pytest.raises(UsageError, match="string and holds 4 distinct values, such as 'yes', not true") as refused:
        forget_rows_of(rows, "image", forget_column="text")
    messages += [str(refused.value), caplog.text]
    assert "Miller" not in "".join(messages)
    assert "Smith" not in "".join(messages) or value.startswith("ann")
    assert ("1 texts that differ from --forget_value in case" in caplog.text) == value.startswith("Ann")


def test_the_number_of_one_class_and_the_name_of_another_is_refused():
    rows = make_rows(["a", "b", "c"]).add_column("digit", [0, 1, 1])
    rows = rows.cast_column("digit", datasets.ClassLabel(names=["1 ", "Two"]))
    assert forget_rows_of(rows, "image", forget_column="digit", forget_value="two") == [1, 2]
    assert forget_rows_of(rows, "image", forget_column="digit", forget_value="0") == [0]
    with pytest.raises(UsageError, match=r"'1' may mean '1 ' \(number 0\) and 'Two' \(number 1\)"):
        forget_rows_of(rows, "image", forget_column="digit", forget_value="1")


@pytest.mark.parametrize("column", ["forget", "Forget", "FORGET "])
@pytest.mark.parametrize(
    "values",
    [
        *([True, False, None, True], ["true", "false", None, "True"], ["yes", "no", "", " YES"]),
        *([1, 0, None, 1], [1.0, 0.0, None, 1.0], ["Forget", "keep", "Keep", "forget"], ["1", "0", "0", "1.0"]),
    ],
)
def test_a_forget_column_as_people_write_it(column, values):
    rows = make_rows(["a", "b", "c", "d"]).add_column(column, values)
    assert forget_rows_of(rows, "image") == [0, 3]
    assert forget_rows_of(rows, "image", forget_column=column) == [0, 3]


@pytest.mark.parametrize(
    ("values", "type_and_example"),
    [
        (["true", "maybe"], "string and holds 2 distinct values, such as 'true'"),
        *(([1, 2], "int64 and holds 1, 2"), ([0.5, 1.0], "double and holds 0.5, 1.0")),
    ],
)
def test_a_forget_column_that_could_be_misread_is_refused(values, type_and_example):
    rows = make_rows(["a", "b"]).add_column("forget", values)
    with pytest.raises(UsageError, match=f"`forget` is of type {type_and_example}.*--forget_value VALUE"):
        forget_rows_of(rows, "image")


def test_classes_of_yes_and_no_are_read_by_their_names():
    rows = make_rows(["a", "b", "c"]).add_column("forget", [0, 1, 0])
    rows = rows.cast_column("forget", datasets.ClassLabel(names=["Yes", "No"]))
    assert forget_rows_of(rows, "image") == [0, 2]


def test_marks_that_another_flag_replaces_are_not_passed_over_in_silence(caplog):
    rows = make_rows(["/f/a", "/f/b"]).add_column("forget", [True, True])
    assert forget_rows_of(rows, "image", ["a"], train_data_dir="/f") == [0]
    assert "`forget` marks 2 rows to forget; --forget_files takes its place" in caplog.text


def test_a_file_to_forget_may_be_named_by_its_whole_path(tmp_path):
    rows = make_rows([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert forget_rows_of(rows, "image", [str(tmp_path / "b.png")], train_data_dir=str(tmp_path)) == [1]
    (tmp_path / "c.heic").write_bytes(b"")
    with pytest.raises(UsageError, match="c.heic is in --train_data_dir and is not read"):
        forget_rows_of(rows, "image", ["c.heic"], train_data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("texts", "value", "expected"),
    [
        *((["1", "1.0", "2.5"], "1", [0, 1]), (["1", "1.0", "2.5"], "1.00", [0, 1]), (["1", "1.0", "x"], "1", [0, 1])),
        *((["1e1", "10", "0"], "10", [0, 1]), (["1", "1.0", "0"], "1", [0, 1]), (["-0", "0.0", "3"], "0", [0, 1])),
        *((["7", "007", "7.0"], "7", [0, 2]), (["7", "007", "7.0"], "007", [1]), (["1e9999", "1", "2"], "1", [1])),
        *(([" 4", "4", None], "4", [0, 1]), (["9007199254740993", "9007199254740992", "x"], "9007199254740992", [1])),
    ],
)
def test_texts_that_are_one_number_are_one_value(texts, value, expected, caplog):
    """As lines of JSON become where a column would write their numbers in another way."""
    rows = make_rows(["a", "b", "c"]).add_column("score", texts)
    assert forget_rows_of(rows, "image", forget_column="score", forget_value=value) == expected
    assert ("are one number" in caplog.text) == (len(expected) > 1)


def test_rows_to_forget_by_a_list_are_refused():
    rows = make_rows(["a"]).add_column("names", [["x"]])
    with pytest.raises(UsageError, match="--forget_column: 'names' holds lists"):
        forget_rows_of(rows, "image", forget_column="names", forget_value="x")


def test_a_letter_of_initials_is_no_word_of_yes_or_no():
    rows = make_rows(["a", "b", "c", "d"]).add_column("who", ["F", "N", "NO", "T"])
    found = {value: forget_rows_of(rows, "image", forget_column="who", forget_value=value) for value in "FNTnt"}
    assert found == {"F": [0], "N": [1], "T": [3], "n": [1], "t": [3]}
    assert forget_rows_of(rows, "image", forget_column="who", forget_value="NO") == [2]


def test_the_exact_name_of_a_class_wins_over_the_number_of_another(caplog):
    rows = make_rows(["a", "b", "c", "d"]).add_column("label", [0, 1, 2, 3])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["0", "1", "10", "2"]))
    assert forget_rows_of(rows, "image", forget_column="label", forget_value="2") == [3]
    assert "'2' is taken for the name of a class, not for number 2, '10'" in caplog.text
    assert forget_rows_of(rows, "image", forget_column="label", forget_value="3") == [3]


def test_a_class_that_is_missing_is_no_value():
    rows = make_rows(["a", "b", "c"]).add_column("forget", [0, -1, None])
    rows = rows.cast_column("forget", datasets.ClassLabel(names=["yes", "no"]))
    assert forget_rows_of(rows, "image") == [0]
    with pytest.raises(
        UsageError, match="no row has 'maybe' in the column `forget`, which is of type classes and holds"
    ):
        forget_rows_of(rows, "image", forget_column="forget", forget_value="maybe")


@pytest.mark.parametrize("values", [[0, 1, None], [0.0, 1.0, 1.0], ["0", "1", "1"], "classes"])
def test_numbers_of_people_are_not_taken_for_yes_and_no(values):
    rows = make_rows(["a", "b", "c"]).add_column("who", [0, 1, 1] if values == "classes" else values)
    if values == "classes":  # as folders called 0 and 1 are
        rows = rows.cast_column("who", datasets.ClassLabel(names=["0", "1"]))
    with pytest.raises(UsageError, match="--forget_value is needed, since the column `who`"):
        forget_rows_of(rows, "image", forget_column="who")
    assert forget_rows_of(rows, "image", forget_column="who", forget_value="0") == [0]


@pytest.mark.parametrize("values", [[True, False], ["true", None], [None, None]])
def test_two_columns_of_marks_are_refused_unless_one_is_named(values, caplog):
    rows = make_rows(["a", "b"]).add_column("forget", [False, True]).add_column("Forget", values)
    with pytest.raises(UsageError, match="`forget` and `Forget` both say what to forget"):
        forget_rows_of(rows, "image")
    assert forget_rows_of(rows, "image", forget_column="forget") == [1]
    assert ("`Forget` marks 1 rows to forget" in caplog.text) == (values[0] is not None)


def test_a_path_to_forget_wins_over_the_same_name_elsewhere(tmp_path, caplog):
    rows = make_rows([str(tmp_path / name) for name in ("a.png", "sub/a.png", "a.png", "sub/b.png")])
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "sub").mkdir()

    def found(name: str) -> list[int]:
        return forget_rows_of(rows, "image", [name], train_data_dir=str(tmp_path))

    for name in ("a.png", "./a.png", str(tmp_path / "a.png"), "sub/../a.png", str(tmp_path / "link" / "a.png")):
        assert found(name) == [0, 2], name  # two rows of metadata may name it
    assert "a.png is also the name of sub/a.png, which is not forgotten" in caplog.text
    assert found("sub/a.png") == found(str(tmp_path / "link/sub/a.png")) == [1] and found("b.png") == [3]


@pytest.mark.parametrize(
    ("name", "cause"),
    [("sub", "sub is a folder; name the files in it"), (".h.png", ".h.png is hidden; rename it without a dot")],
)
def test_the_cause_that_a_file_to_forget_is_not_read(name, cause, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".h.png").write_bytes(b"")
    rows = make_rows([str(tmp_path / "a.png")])
    with pytest.raises(UsageError, match=f"--forget_files: {name} .*{cause.partition(' ')[2]}"):
        forget_rows_of(rows, "image", [name], train_data_dir=str(tmp_path))


def test_the_cause_that_a_file_outside_is_not_found(tmp_path):
    """It is in no folder that the training set has, whatever its name."""
    (tmp_path / "train" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("other/x.png", "other/.h.png"):
        (tmp_path / name).write_bytes(b"")
    rows = make_rows([str(tmp_path / "train/a.png")])
    for name in (str(tmp_path / "other/x.png"), "../other/x.png", "../other/.h.png", "../other", "/"):
        with pytest.raises(
            UsageError, match=f"--forget_files: {name} is not in --train_data_dir; name a file in it, or"
        ):
            forget_rows_of(rows, "image", [name], train_data_dir=str(tmp_path / "train"))
    with pytest.raises(UsageError, match="is a folder"):
        forget_rows_of(rows, "image", [str(tmp_path / "train")], train_data_dir=str(tmp_path / "train"))


def test_a_path_through_a_link_to_a_folder_below_is_found(tmp_path):
    rows = make_rows([str(tmp_path / "train/sub/a.png"), str(tmp_path / "train/b.png")])
    (tmp_path / "train" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "train" / "sub")
    names = [str(tmp_path / "link" / "a.png")]
    assert forget_rows_of(rows, "image", names, train_data_dir=str(tmp_path / "train")) == [0]

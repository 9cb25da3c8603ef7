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


@pytest.mark.parametrize("captions", [[1, 2], [[1], [2]]])
def test_captions_of_another_type_are_none(captions):
    images = Images(embedded([flat(0), flat(1)]).add_column("text", captions), "image", None, "--train_data_dir")
    with pytest.raises(UsageError, match="2 of 2 images have no caption"):
        load_captions(images, "text")


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


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [("age", "3", [1]), ("age", "1.5", []), ("share", "0.5", [0, 2]), ("adult", "True", [1]), ("name", "None", [])],
)
def test_rows_to_forget_by_value(column, value, expected):
    rows = make_rows(["a", "b", "c"])
    for name, values in {
        "age": [1, 3, None],
        "share": [0.5, 0.25, 0.5],
        "adult": [False, True, None],
        "name": ["x", None, "y"],
    }.items():
        rows = rows.add_column(name, values)
    assert forget_rows_of(rows, "image", forget_column=column, forget_value=value) == expected


def test_rows_to_forget_by_a_list_are_refused():
    rows = make_rows(["a"]).add_column("names", [["x"]])
    with pytest.raises(UsageError, match="--forget_column: 'names' holds lists"):
        forget_rows_of(rows, "image", forget_column="names", forget_value="x")

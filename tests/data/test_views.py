"""`select`, `filter`, `sort` and `shuffle` leave the table below a data set as it is; its rows are those that it shows."""

import datasets
import pytest
from PIL import Image

from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.cells import cells_of, image_files
from siss_diffusers.data.column_values import describe_values, marked_rows, rows_with_value
from siss_diffusers.data.forget_set import forget_rows_of
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.memory import rows_of
from siss_diffusers.data.saved import with_images
from siss_diffusers.data.sources import check_image_paths, refuse_rows_to_keep
from siss_diffusers.errors import UsageError
from tests.helpers.image_rows import flat
from tests.helpers.untrusted import refusal


NUM_ROWS = 8
FORGET = (0, 3, 6)

VIEWS = {
    "select": lambda rows: rows.select([2, 0]),
    "nothing": lambda rows: rows.select([]),
    "filter": lambda rows: rows.filter(lambda number: number % 2 == 0, input_columns="number"),
    "sort": lambda rows: rows.sort("number", reverse=True),
    "shuffle": lambda rows: rows.shuffle(seed=1),
    "train_test_split": lambda rows: rows.train_test_split(0.5, seed=0)["train"],
    "twice": lambda rows: rows.shuffle(seed=1).filter(lambda number: number > 2, input_columns="number"),
    "contiguous": lambda rows: rows.select(range(2, 7)),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> datasets.Dataset:
    folder = tmp_path_factory.mktemp("views")
    for number in range(NUM_ROWS):
        Image.fromarray(flat(number)).save(folder / f"{number}.png")
    columns = {
        "image": [str(folder / f"{number}.png") for number in range(NUM_ROWS)],
        "forget": [number in FORGET for number in range(NUM_ROWS)],
        "who": ["anna" if number in FORGET else "ben" for number in range(NUM_ROWS)],
        "label": [number // 4 for number in range(NUM_ROWS)],
        "number": list(range(NUM_ROWS)),
        "text": [f"text {number}" for number in range(NUM_ROWS)],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return rows.cast_column("label", datasets.ClassLabel(names=["low", "high"]))


@pytest.fixture(params=VIEWS)
def view(request, table) -> datasets.Dataset:
    return VIEWS[request.param](table)


def test_rows_to_forget_are_those_that_are_shown(view):
    numbers = view["number"][:]
    rows = rows_of(view, "keep").rows
    expected = [row for row, number in enumerate(numbers) if number in FORGET]
    assert forget_rows_of(rows, "image") == marked_rows(rows, "forget") == expected
    files = [f"{numbers[row]}.png" for row in expected]
    if expected:
        assert forget_rows_of(rows, "image", forget_column="who", forget_value="Anna") == expected
        folder = image_files(rows, "image")[0].as_py()["path"].rpartition("/")[0]
        assert forget_rows_of(rows, "image", files, train_data_dir=folder) == expected
    for value, label in (("low", 0), ("high", 1)):
        labelled = [row for row, number in enumerate(numbers) if number // 4 == label]
        if labelled:
            assert rows_with_value(rows, "label", value) == labelled
        else:
            assert "no row has" in refusal(rows_with_value, rows, "label", value)
    for row, number in enumerate(numbers):
        assert rows_with_value(rows, "number", str(number)) == [row]


def test_cells_are_those_that_are_shown(view):
    rows = rows_of(view, "keep").rows
    for column in ("number", "text", "forget", "label"):
        assert cells_of(rows, column).to_pylist() == view[column][:]
    paths = [file["path"].rpartition("/")[2] for file in image_files(rows, "image").to_pylist()]
    assert paths == [f"{number}.png" for number in view["number"]]
    if len(view):
        images = rows_of(view, "keep", "text").images(None)
        assert load_captions(images, "text").to_pylist() == view["text"][:]


def test_what_is_not_shown_is_neither_refused_nor_named(table):
    files = [table.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"], None, "elsewhere.png"]
    columns = {"image": files, "forget": [True, False, None], "who": ["a", "b", "c"]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    assert len(rows_of(rows.select([2, 0]), "keep").rows) == 2
    assert "row 1 has no image" in refusal(rows_of, rows.select([2, 1]), "keep")
    check_image_paths(rows.select([0, 0]), "image", "--x", ["/"])
    assert "row 1 has no image" in refusal(check_image_paths, rows.select([0, 1]), "image", "--x", ["/"])
    refuse_rows_to_keep(rows_of(rows.select([2, 0]), "forget"))
    with pytest.raises(UsageError, match="no row has 'b'"):
        rows_with_value(rows.select([2, 0]), "who", "b")
    assert "'b'" not in describe_values(rows.select([2, 0]), "who")


def test_the_bytes_that_are_shown_say_whether_a_column_holds_images():
    rows = datasets.Dataset.from_dict({"image": [b"no picture", b"\x89PNG of a kind"]})
    assert isinstance(with_images(rows.select([1, 1]), "image", "--x").features["image"], datasets.Image)
    assert "no image file" in refusal(with_images, rows.select([0, 1]), "image", "--x")


@pytest.mark.parametrize(
    "formatted",
    [lambda rows: rows.with_format("torch", columns=["text"]), lambda rows: rows.with_transform(lambda batch: {})],
)
def test_a_format_hides_no_pictures(formatted, table):
    images = rows_of(formatted(table), "keep", "text").images(ImageTransform(1, 8))
    assert images.open(3).getpixel((1, 0)) == 3

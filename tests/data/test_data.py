import tracemalloc
from contextlib import contextmanager
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from siss_diffusers import draws
from siss_diffusers.data import (
    Images,
    ImageTransform,
    KeepOrder,
    PairDataset,
    WindowSampler,
    check_image_paths,
    digest_images,
    forget_rows_of,
    load_captions,
    nearest_neighbors,
    same_captions,
    to_channels,
    window_loader,
)
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import SISS, EraseDiff, ReTrack
from tests.helpers.pictures import write_images


def gradient_image(height=12, width=8, channels=3) -> np.ndarray:
    pixels = np.arange(height * width * channels).reshape(height, width, channels) % 256
    return pixels.astype(np.uint8)


def make_rows(paths: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))


def make_images(arrays: list[np.ndarray], folder, **transform) -> Images:
    names = [f"{index:02d}.png" for index in range(len(arrays))]
    write_images(folder, dict(zip(names, arrays)))
    rows = make_rows([str(folder / name) for name in names])
    return Images(rows, "image", ImageTransform(channels=1, resolution=8, **transform), "--train_data_dir")


@pytest.fixture
def numbered(tmp_path) -> Images:
    """Twenty flat images whose grey level is their index, so that a tensor tells which image it is."""
    return make_images([np.full((8, 8), index, np.uint8) for index in range(20)], tmp_path / "numbered")


def index_of(tensor: torch.Tensor) -> int:
    return round((tensor.mean().item() + 1) * 127.5)


class TestImageTransform:
    def test_without_a_generator_it_is_resize_and_center_crop_to_minus_one_to_one(self):
        pixels = gradient_image(12, 8)
        tensor = ImageTransform(channels=3, resolution=8)(Image.fromarray(pixels))
        expected = torch.from_numpy(pixels[2:10]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(tensor, expected)

    def test_random_crop_and_flip_come_from_the_generator_alone(self):
        image = Image.fromarray(gradient_image(32, 8))
        transform = ImageTransform(channels=3, resolution=8, random_flip=True)
        views = [transform(image, np.random.default_rng(seed)) for seed in range(20)]
        again = [transform(image, np.random.default_rng(seed)) for seed in range(20)]
        assert all(torch.equal(view, other) for view, other in zip(views, again))
        assert len({view.numpy().tobytes() for view in views}) > 10

    def test_center_crop_leaves_only_the_flip_random(self):
        image = Image.fromarray(gradient_image(32, 8))
        transform = ImageTransform(channels=3, resolution=8, center_crop=True, random_flip=True)
        views = {transform(image, np.random.default_rng(seed)).numpy().tobytes() for seed in range(20)}
        assert len(views) == 2

    def test_sixteen_bits_are_kept_only_when_asked(self):
        pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
        exact = ImageTransform(channels=1, resolution=8, preserve_input_precision=True)(Image.fromarray(pixels))
        rounded = ImageTransform(channels=1, resolution=8)(Image.fromarray(pixels))
        expected = torch.from_numpy(pixels.astype(np.float32) / 65535 * 2 - 1)
        torch.testing.assert_close(exact[0], expected, atol=1e-4, rtol=0)
        assert rounded.unique().numel() <= 64 and (rounded[0] - expected).abs().max() < 1 / 64

    def test_grey_stored_as_rgb_is_grey_and_colour_is_refused(self):
        grey = np.repeat(gradient_image(8, 8, 1), 3, axis=2)
        assert np.array_equal(np.asarray(to_channels(Image.fromarray(grey), 1)), grey[..., 0])
        with pytest.raises(ValueError, match="colours"):
            to_channels(Image.fromarray(gradient_image()), 1)


def test_digest_sees_pixels_not_files(tmp_path):
    """The same picture as PNG, BMP and RGB has one digest; one changed pixel has another."""
    pixels = gradient_image(8, 8, 1)[..., 0]
    other = pixels.copy()
    other[0, 0] += 1
    images = make_images([pixels, np.repeat(pixels[..., None], 3, axis=2), other], tmp_path / "a")
    Image.fromarray(pixels).save(tmp_path / "a" / "00.png", format="BMP")
    first, second, third = digest_images(images, range(3))
    assert first == second != third


def test_digests_are_the_same_for_any_number_of_processes(numbered):
    parts = []
    for process_index in range(3):
        digest_images(numbered, range(20), process_index, 3, gather=lambda part: parts.extend(part) or part)
    assert [digest for part, _ in parts for digest in part] == digest_images(numbered, range(20))


def test_nearest_neighbors(numbered, tmp_path):
    forget = make_images([np.full((8, 8), 7, np.uint8)], tmp_path / "forget")
    (neighbors,) = nearest_neighbors(numbered, forget, 3, range(20))
    assert sorted(neighbors) == [6, 7, 8]


def test_nearest_neighbors_of_the_same_condition(numbered, tmp_path):
    forget = make_images([np.full((8, 8), 7, np.uint8)], tmp_path / "forget")
    even_and_odd = [index % 2 for index in range(20)]
    (neighbors,) = nearest_neighbors(numbered, forget, 3, range(20), even_and_odd, [1])
    assert sorted(neighbors) == [5, 7, 9]
    with pytest.raises(UsageError, match="only 10 images to keep with the prompt"):
        nearest_neighbors(numbered, forget, 11, range(20), even_and_odd, [1])


class TestPairs:
    def pairs(self, numbered, method=None, num_pairs=4, timestep_range=(0, 1000), seed=0, **kwargs) -> PairDataset:
        keep, forget = numbered.select(range(15)), numbered.select(range(15, 20))
        order = KeepOrder(keep, np.arange(15), set(), seed)
        return PairDataset(keep, forget, order, method or SISS(), num_pairs, timestep_range, seed, **kwargs)

    def test_keep_and_forget_are_disjoint_and_every_image_is_used(self, numbered):
        pairs = self.pairs(numbered)
        items = [pairs[position] for position in range(15)]
        assert {index_of(item["keep"]) for item in items} == set(range(15))
        assert {index_of(item["forget"]) for item in items} == set(range(15, 20))

    def test_timesteps_span_the_requested_range(self, numbered):
        timesteps = [int(self.pairs(numbered)[position]["timesteps"]) for position in range(400)]
        assert min(timesteps) < 20 and max(timesteps) > 980 and len(set(timesteps)) > 250
        narrow = self.pairs(numbered, timestep_range=(3, 6))
        assert {int(narrow[position]["timesteps"]) for position in range(60)} == {3, 4, 5}

    def test_a_share_lambda_of_every_window_is_made_from_forget_images(self, numbered):
        pairs = self.pairs(numbered, SISS(lam=0.25), num_pairs=8)
        for window in range(5):
            assert sum(bool(pairs[8 * window + pair]["from_forget"]) for pair in range(8)) == 2

    def test_draws_are_keyed_by_seed_window_and_pair(self, numbered):
        pairs, same, other = (self.pairs(numbered, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(pairs[5]["noise"], same[5]["noise"])
        assert not torch.equal(pairs[5]["noise"], other[5]["noise"])
        noises = torch.stack([pairs[position]["noise"] for position in range(50)])
        assert torch.unique(noises, dim=0).shape[0] == 50
        assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.05

    @pytest.mark.parametrize("workers", [0, 2])
    def test_ranks_and_micro_batches_cover_each_window_once(self, numbered, workers):
        """Two processes of two micro-batches draw what one process of one micro-batch draws, each pair once."""
        pairs = self.pairs(numbered, num_pairs=8)
        whole = next(iter(window_loader(pairs, WindowSampler(8, 1, 0, 1, first_window=3), workers)))
        parts = {}
        for rank in range(2):
            batches = iter(window_loader(pairs, WindowSampler(2, 2, rank, 2, first_window=3), workers))
            for micro_step in range(2):
                parts[2 * micro_step + rank] = next(batches)
        for key, expected in whole.items():
            assert torch.equal(torch.cat([parts[index][key] for index in range(4)]), expected), key

    def test_methods_get_what_they_need(self, numbered):
        item = self.pairs(numbered, EraseDiff())[0]
        assert 0 <= item["uniform"].min() and item["uniform"].max() < 1
        item = self.pairs(numbered, ReTrack(num_neighbors=2), neighbors=[[1, 2]] * 5)[0]
        assert [index_of(neighbor) for neighbor in item["neighbors"]] == [1, 2]
        assert "uniform" not in item and "neighbors" not in self.pairs(numbered)[0]


def embedded(pictures: list[np.ndarray], **columns: list) -> datasets.Dataset:
    """Rows whose pictures lie in the data, as of a Parquet file."""
    cells = []
    for pixels in pictures:
        content = BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        cells.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": cells}, features)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def flat(number: int) -> np.ndarray:
    """An 8x8 picture of its own for each number below 65,536."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    return pixels


class CountingImages(Images):
    """Remembers what was decoded to be compared."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.decoded: list[int] = []

    def digest(self, index: int) -> bytes:
        self.decoded.append(index)
        return super().digest(index)


def counting(pictures: list[np.ndarray]) -> CountingImages:
    return CountingImages(embedded(pictures), "image", ImageTransform(channels=1, resolution=8), "--dataset_name")


class TestKeepOrder:
    SIZE = 60
    COPIES = (3, 17, 18, 41)

    def images(self) -> CountingImages:
        """Rows 3, 17, 18 and 41 are copies of the forget image, row 50."""
        return counting([flat(50 if row in self.COPIES else row) for row in range(self.SIZE)])

    def order(self, images=None, seed=0, limit=None) -> KeepOrder:
        images = images or self.images()
        return KeepOrder(images, np.delete(np.arange(self.SIZE), 50), {Images.digest(images, 50)}, seed, limit)

    def test_a_pass_holds_what_is_to_keep_once_and_copies_never(self):
        order = self.order()
        kept = sorted(set(range(self.SIZE)) - {*self.COPIES, 50})
        drawn = [order[position] for position in range(3 * len(kept))]
        passes = [drawn[start : start + len(kept)] for start in range(0, len(drawn), len(kept))]
        assert [sorted(one_pass) for one_pass in passes] == [kept] * 3
        assert len({tuple(one_pass) for one_pass in passes}) == 3

    def test_positions_do_not_depend_on_what_was_asked_before(self):
        """Ranks, workers and resumed runs start anywhere, and longer runs plan more."""
        one_by_one, scattered, planned = self.order(), self.order(), self.order()
        forward = [one_by_one[position] for position in range(130)]
        planned.walk(20)
        assert {position: scattered[position] for position in range(129, -1, -7)} == dict(
            list(enumerate(forward))[129::-7]
        )
        assert [planned[position] for position in range(130)] == forward

    def test_only_what_is_drawn_is_decoded_and_that_once(self):
        images = self.images()
        order = self.order(images)
        order.walk(12)
        assert 12 <= len(images.decoded) <= 12 + len(self.COPIES)
        drawn = [order[position] for position in range(12)]
        assert set(drawn) <= set(images.decoded) and len(images.decoded) == len(set(images.decoded))
        order.walk(1_000)
        assert sorted(images.decoded) == sorted(set(range(self.SIZE)) - {50})
        removed = len(self.COPIES)
        assert order.counts() == {
            "keep": self.SIZE - 1 - removed,
            "duplicates_removed": removed,
            "checked": self.SIZE - 1,
        }

    def test_every_image_is_equally_likely_at_every_position(self):
        """Over seeds, at the first positions: where copies were skipped nothing takes their share."""
        images, seeds = self.images(), 2_000
        digests = [Images.digest(images, row) for row in range(self.SIZE)]
        images.digest = lambda row: digests[row]
        counts = np.zeros((3, self.SIZE))
        for seed in range(seeds):
            order = KeepOrder(images, np.delete(np.arange(self.SIZE), 50), {digests[50]}, seed)
            for position in range(3):
                counts[position, order[position]] += 1
        kept = sorted(set(range(self.SIZE)) - {*self.COPIES, 50})
        expected = seeds / len(kept)
        assert counts[:, [*self.COPIES, 50]].sum() == 0
        assert np.abs(counts[:, kept] - expected).max() < 5 * expected**0.5

    def test_a_limit_takes_so_many_images_that_are_no_copies(self):
        orders = [self.order(seed=seed, limit=9) for seed in range(12)]
        for order in orders:
            drawn = [order[position] for position in range(27)]
            subset = set(drawn)
            assert len(subset) == 9 and not subset & {*self.COPIES, 50}
            assert all(set(drawn[start : start + 9]) == subset for start in (0, 9, 18))
            assert set(order.first(1_000)) <= subset and order.counts()["keep"] == 9

    def test_a_sample_to_compare_with_holds_no_copies_either(self):
        images = self.images()
        order, among = self.order(images), np.arange(self.SIZE) < 20
        assert order.first(5) == sorted(order[position] for position in range(5))
        assert order.first(1_000, among) == [row for row in range(20) if row not in self.COPIES]
        assert order.first(3, among) == sorted(order.first(3, among)) and len(order.first(3, among)) == 3
        only_copies = np.isin(np.arange(self.SIZE), self.COPIES)
        assert order.first(5, only_copies) == []

    def test_what_cannot_be_read_matters_only_where_it_is_drawn(self):
        order = self.order()
        last = order[54]  # of the first pass
        cells = self.images().rows.to_list()
        cells[last]["image"]["bytes"] = b"not a picture"
        spoilt = datasets.Dataset.from_list(cells, datasets.Features(image=datasets.Image(decode=False)))
        images = Images(spoilt, "image", ImageTransform(channels=1, resolution=8), "--dataset_name")
        order = self.order(images)
        order.walk(50)
        with pytest.raises(UsageError, match=f"--dataset_name: cannot read image {last} "):
            order.walk(55)


def test_long_passes_are_permuted_once(monkeypatch):
    """A permutation of a million for every item would take as long as the step."""
    images = counting([flat(row) for row in range(30)])
    order = KeepOrder(images, np.arange(30), set(), seed=0)
    order.walk(30)
    pairs = PairDataset(images, images.select([0]), order, SISS(), 4, (0, 1000), 0)
    draws.epoch_order.cache_clear()
    made, default_rng = [], np.random.default_rng

    def counted(key):
        made.append(tuple(key)) if key[1] == draws.ORDER else None
        return default_rng(key)

    monkeypatch.setattr(np.random, "default_rng", counted)
    for position in range(30, 90):  # with one forget image, every position is a pass of its own there
        pairs[position]
    assert [key for key in made if key[2] == 0] == [(0, draws.ORDER, 0, 1), (0, draws.ORDER, 0, 2)]


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
            assert order.counts() == {"keep": MILLION - 1, "duplicates_removed": 0, "checked": 640}
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

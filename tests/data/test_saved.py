"""Data sets as other tools leave them."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.sources import load_image_rows
from siss_diffusers.errors import UsageError


TRANSFORM = ImageTransform(channels=1, resolution=8, center_crop=True)
PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS + seed).save(file, format="PNG")
    return file.getvalue()


def table(tmp_path, values, feature=None, name="data.parquet"):
    folder = tmp_path / "set"
    folder.mkdir()
    features = None if feature is None else datasets.Features({"image": feature})
    datasets.Dataset.from_dict({"image": values}, features=features).to_parquet(folder / name)
    return folder


def assert_pixels(rows) -> None:
    images = rows.images(TRANSFORM)
    assert len(images) == 3
    for seed in range(3):
        assert np.allclose((images.load(seed)[0].numpy() / 2 + 0.5) * 255, PIXELS + seed, atol=1e-3)


def load(folder, tmp_path, **options):
    return load_image_rows("--data", str(folder), "image", cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_of_save_to_disk(tmp_path, is_folder, splits):
    cells = [{"bytes": png(seed), "path": None} for seed in range(3)]
    data = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    if splits:
        data = datasets.DatasetDict(train=data, test=data.select([0]))
    data.save_to_disk(tmp_path / "saved")
    assert_pixels(load(tmp_path / "saved", tmp_path, is_folder=is_folder))


def test_a_saved_set_without_train_and_one_that_names_other_files(tmp_path):
    data = datasets.Dataset.from_dict({"image": [1]})
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "splits")
    with pytest.raises(UsageError, match="has no split `train`, only test"):
        load(tmp_path / "splits", tmp_path, is_folder=False)
    state = tmp_path / "splits/test/state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = "../../other.arrow"
    state.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="lies outside of it"):
        load(tmp_path / "splits/test", tmp_path, is_folder=False)


def test_a_column_of_bytes_is_one_of_images(tmp_path):
    folder = table(tmp_path, [png(seed) for seed in range(3)])
    assert_pixels(load(folder, tmp_path, is_folder=False))


def test_a_column_of_bytes_and_paths_is_one_of_images(tmp_path):
    feature = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    folder = table(tmp_path, [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(3)], feature)
    assert_pixels(load(folder, tmp_path, is_folder=False))


def test_a_column_of_bytes_alone_is_one_of_images(tmp_path):
    feature = {"bytes": datasets.Value("large_binary"), "width": datasets.Value("int64")}
    folder = table(tmp_path, [{"bytes": png(seed), "width": 8} for seed in range(3)], feature)
    assert_pixels(load(folder, tmp_path, is_folder=False))


@pytest.mark.parametrize(
    "value, words",
    [
        *(
            ([[1, 2]], "list.*list"),
            (7, "int64"),
            ({"bytes": 7}, "struct"),
            (None, "nothing"),
            ({"path": "x"}, "struct"),
        ),
    ],
)
def test_columns_of_no_image_files_are_refused_by_their_type(tmp_path, value, words):
    with pytest.raises(UsageError, match=f"'image' of --data holds .*{words}.*; save each image as a file"):
        load(table(tmp_path, [value] * 3), tmp_path, is_folder=False)


@pytest.mark.parametrize(
    "value, words",
    [("https://example.org/a.jpg", "addresses"), ("a.png", "file_name"), (b"no picture", "no image file")],
)
def test_other_columns_are_refused_by_what_they_hold(tmp_path, value, words):
    with pytest.raises(UsageError, match=f"--image_column: 'image' of --data holds .*{words}"):
        load(table(tmp_path, [value] * 3), tmp_path, is_folder=False)


@pytest.mark.parametrize("name", ["metadata.json", "metadata.jsonl.txt", "Metadata.jsonl", "part/Metadata.jsonl"])
def test_metadata_of_another_name_is_refused(tmp_path, name):
    folder = tmp_path / "images"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).with_name("0.png").write_bytes(png(0))
    (folder / name).write_text(json.dumps([{"file_name": "0.png", "text": "a"}]))
    with pytest.raises(
        UsageError,
        match="--data: .*etadata.* is not read under this name; .* call the file metadata.jsonl, or remove it",
    ):
        load(folder, tmp_path, is_folder=True)


def test_a_name_that_is_not_cached(tmp_path):
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set: unset it"):
        load("someone/nothing", tmp_path, is_folder=False)

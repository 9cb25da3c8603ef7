"""What models are measured with: different forget images, keep images of their prompts, ordinary prompts."""

import numpy as np
import pytest
import torch

from siss_diffusers.data.images import Images
from siss_diffusers.data.split import DataSource
from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation import collect_data, split_to_measure
from siss_diffusers.evaluation import data as data_module
from siss_diffusers.families import StableDiffusion
from siss_diffusers.settings import TextToImageSettings
from tests.helpers.image_rows import make_images
from tests.helpers.pictures import SECRET


def pictures(*levels: int) -> list[np.ndarray]:
    return [np.full((8, 8), level, dtype=np.uint8) for level in levels]


@pytest.fixture
def keep(tmp_path):
    return make_images(pictures(10, 20, 30, 40, 50), tmp_path / "keep")


@pytest.fixture
def forget(tmp_path):
    return make_images(pictures(200, 210, 200, 210), tmp_path / "forget")


def levels(images: torch.Tensor) -> list[int]:
    return [round(255 * image.mean().item()) for image in images]


def test_equal_forget_images_count_once_and_everything_may_be_kept(keep, forget):
    data = collect_data(keep, forget, num_samples=4, with_ordinary_images=False)
    assert levels(data.forget) == [200, 210] and sorted(levels(data.keep)) == [10, 20, 30, 40, 50]
    assert data.keep is data.ordinary_images and data.prompts == ("",)
    assert data.forget_prompts.tolist() == [0, 0] and len(data.keep_prompts) == 5
    other = collect_data(keep, forget, num_samples=4, with_ordinary_images=False, seed=1)
    assert levels(other.keep) != levels(data.keep)


def test_images_to_keep_have_the_prompts_of_forget_images(keep, forget):
    keep_prompts, forget_prompts = ["b", "x", "a", "x", "y"], ["b", "a", "b", "a"]
    data = collect_data(keep, forget, keep_prompts, forget_prompts, num_samples=2, with_ordinary_images=True)
    assert data.prompts == ["a", "b"] and data.forget_prompts.tolist() == [1, 0]
    assert dict(zip(levels(data.keep), data.keep_prompts.tolist())) == {10: 1, 30: 0}
    # The most frequent first.
    assert data.ordinary_prompts == ["x", "y"] and sorted(levels(data.ordinary_images)) == [20, 40, 50]
    without = collect_data(keep, forget, keep_prompts, forget_prompts, num_samples=2, with_ordinary_images=False)
    assert without.ordinary_images is None


def test_where_no_image_to_keep_has_such_a_prompt_all_are_compared_with(keep, forget):
    data = collect_data(keep, forget, ["x"] * 5, ["a"] * 4, num_samples=1, with_ordinary_images=False)
    assert data.keep_prompts is None and len(data.keep) == 5


def test_a_prompt_without_a_sample_is_refused(keep, forget):
    with pytest.raises(UsageError, match="--num_samples must be at least 2"):
        collect_data(keep, forget, ["x"] * 5, ["a", "b", "a", "b"], num_samples=1, with_ordinary_images=False)


@pytest.mark.parametrize("limit, expected", [(2_000, 20), (2, 4)])
def test_of_a_large_set_no_more_is_read_than_is_used(captioned_folder, monkeypatch, limit, expected):
    """The first images to keep, and the first of the memorized prompts, which may be few among many."""
    monkeypatch.setattr(data_module, "MAX_KEEP_IMAGES", limit)
    opened, open_image = [], Images.open
    monkeypatch.setattr(Images, "open", lambda images, index: opened.append(index) or open_image(images, index))
    given = DataSource.of(TextToImageSettings(train_data_dir=str(captioned_folder))).load()
    split = split_to_measure(given, StableDiffusion(3, 32), seed=0, drop_near_duplicates=False, caption_column="text")
    assert min(limit, 20) <= len(split.keep) <= expected
    assert len(opened) == len(split.keep) + len(split.forget) == len(split.keep) + 3
    assert split.keep_prompts.count(SECRET) >= min(limit, 10)

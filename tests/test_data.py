import datasets
import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from siss_diffusers.data import (
    Images,
    ImageTransform,
    KeepOrder,
    PairDataset,
    WindowSampler,
    digest_images,
    nearest_neighbors,
    to_channels,
    window_loader,
)
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import SISS, EraseDiff, ReTrack


def gradient_image(height=12, width=8, channels=3) -> np.ndarray:
    pixels = np.arange(height * width * channels).reshape(height, width, channels) % 256
    return pixels.astype(np.uint8)


def make_images(arrays: list[np.ndarray], folder, **transform) -> Images:
    names = [f"{index:02d}.png" for index in range(len(arrays))]
    write_images(folder, dict(zip(names, arrays)))
    rows = datasets.Dataset.from_dict({"image": [str(folder / name) for name in names]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
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

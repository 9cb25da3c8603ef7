import numpy as np
import pytest
import torch
from PIL import Image

from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.keep_order import read_in_parts
from siss_diffusers.data.latents import nearest_neighbors
from siss_diffusers.data.viewing import to_channels
from siss_diffusers.errors import UsageError
from tests.helpers.image_rows import make_images


def gradient_image(height=12, width=8, channels=3) -> np.ndarray:
    pixels = np.arange(height * width * channels).reshape(height, width, channels) % 256
    return pixels.astype(np.uint8)


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
    first, second, third = (images.digest(index) for index in range(3))
    assert first == second != third


def test_digests_are_the_same_for_any_number_of_processes(numbered):
    def digests(rows):
        return [numbered.digest(row) for row in rows]

    parts = []
    for process_index in range(3):
        read_in_parts(digests, range(20), process_index, 3, gather=lambda part: parts.extend(part) or part)
    assert [digest for part, _ in parts for digest in part] == digests(range(20)) == read_in_parts(digests, range(20))


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

import pytest
import torch

from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.metrics.damage import damaged


GENERATOR = torch.Generator().manual_seed(0)
DIGIT = torch.from_numpy(digit_images()[0][:1]) / 255
GARMENT = torch.from_numpy(garment_image())[None] / 255  # the same from left and right
IMAGES = {
    "colour": torch.rand(3, 24, 16, generator=GENERATOR),
    "large": torch.rand(3, 300, 200, generator=GENERATOR),
    "grey": DIGIT,
    "grey in three channels": DIGIT.expand(3, -1, -1),
    "symmetric": GARMENT,
}
KINDS = {"noise", "blur", "contrast", "hue", "crop", "flip", "shift"}
NO_CHANGE = {"grey": {"hue"}, "grey in three channels": {"hue"}, "symmetric": {"hue", "flip"}}


@pytest.mark.parametrize("name", IMAGES)
def test_every_damage_shows_and_leaves_an_image(name):
    image = IMAGES[name]
    copies = damaged(image)
    assert set(copies) == KINDS - NO_CHANGE.get(name, set())
    for kind, copy in copies.items():
        assert copy.shape == image.shape and copy.dtype == image.dtype, kind
        assert copy.min() >= 0 and copy.max() <= 1, kind
        assert (copy - image).abs().max() > 0.01, kind


def test_what_the_damages_do():
    image = IMAGES["colour"]
    copies = damaged(image)
    assert (copies["noise"] - image).std().item() == pytest.approx(0.1, rel=0.15)
    torch.testing.assert_close(copies["hue"], image[[2, 0, 1]], atol=1e-5, rtol=0)
    assert torch.equal(copies["flip"], image.flip(2))
    assert torch.equal(copies["shift"][..., 1:], image[..., :-1])
    assert torch.equal(copies["shift"][..., 0], image[..., 0])
    assert copies["blur"].std() < 0.6 * image.std()
    assert copies["contrast"].std().item() == pytest.approx(image.std().item() / 2, rel=0.02)


def test_a_crop_enlarges_the_middle():
    ramp = torch.linspace(0, 1, 40).expand(1, 40, 40)
    crop = damaged(ramp)["crop"]
    assert crop[0, 20, 0].item() == pytest.approx(2 / 39, abs=0.01)
    assert crop[0, 20, -1].item() == pytest.approx(37 / 39, abs=0.01)


def test_a_seed_gives_the_same_damage_again():
    first, again, other = damaged(DIGIT, seed=1), damaged(DIGIT, seed=1), damaged(DIGIT, seed=2)
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert not torch.equal(first["noise"], other["noise"])

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics, wilson_interval
from siss_diffusers.metrics.pictures import frame_copies
from siss_diffusers.similarity import correlation, pixel_l2


DIGITS = torch.from_numpy(digit_images()[0]).unsqueeze(1) / 255
GARMENT = torch.from_numpy(garment_image())[None, None] / 255


@pytest.mark.parametrize("successes, trials", [(0, 4096), (1, 4096), (194, 4096), (7, 10), (10, 10)])
def test_wilson_is_scipys(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_distances_are_those_of_naive_loops():
    samples, references = torch.rand(5, 3, 6, 6), torch.rand(2, 3, 6, 6)
    for index, sample in enumerate(samples):
        distances = [np.linalg.norm((sample - reference).numpy()) for reference in references]
        assert pixel_l2(samples, references)[index].item() == pytest.approx(min(distances), rel=1e-5)
        center = sample - sample.mean(dim=(1, 2), keepdim=True)
        values = []
        for reference in references:
            moved = reference - reference.mean(dim=(1, 2), keepdim=True)
            values.append(F.cosine_similarity(center.flatten(), moved.flatten(), dim=0).item())
            values.append(F.cosine_similarity(center.mean(0).flatten(), moved.mean(0).flatten(), dim=0).item())
        assert correlation(samples, references, max_shift=0)[index].item() == pytest.approx(max(values), abs=1e-5)


def moved(picture: torch.Tensor, down: int, right: int, fill: str) -> torch.Tensor:
    """Moved by a pixel; what comes in is black (`constant`) or the edge drawn out (`replicate`)."""
    padded = F.pad(picture, (1,) * 4, mode=fill)
    return padded[..., 1 - down : 9 - down, 1 - right : 9 - right]


def damaged_copies() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 1, 8, 8, generator=generator)
    copies = {
        "exact": GARMENT,
        "noise": (GARMENT + 0.15 * noise).clamp(0, 1),
        "blur": F.conv2d(F.pad(GARMENT, (1,) * 4, mode="replicate"), torch.ones(1, 1, 3, 3) / 9),
        "contrast": 0.5 + 0.25 * (GARMENT - 0.5),
        "bright": (GARMENT + 0.3).clamp(0, 1),
        "dark": 0.3 * GARMENT,
        "dim and noisy": 0.5 * (GARMENT + 0.1 * noise).clamp(0, 1),
        "rolled": torch.roll(GARMENT, 1, dims=3),
    }
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    for fill in ("constant", "replicate"):
        copies[f"moved, {fill}"] = torch.cat([moved(GARMENT, *move, fill) for move in moves])
    return copies


@pytest.mark.parametrize("damage", damaged_copies())
def test_a_damaged_copy_is_a_copy(damage):
    detectors = CopyDetectors.calibrated(GARMENT, DIGITS)
    assert detectors.flags(damaged_copies()[damage])["any"].all()


def test_a_pixel_distance_alone_misses_damaged_copies():
    detectors = CopyDetectors.calibrated(GARMENT, DIGITS)
    assert not detectors.flags(damaged_copies()["dark"])["pixel_l2"].item()


def in_colour(pictures: torch.Tensor) -> torch.Tensor:
    """Three channels as alike as those of a picture in colour."""
    return torch.cat([pictures, 0.7 * pictures + 0.3 * pictures.flip(2), 0.5 + 0.3 * pictures], dim=1)


@pytest.mark.parametrize("gains", [(1.0, 0.2, 0.1), (0.1, 1.0, 0.3), (0.5, 0.4, 1.0)])
@pytest.mark.parametrize("offsets", [(0.0, 0.0, 0.0), (0.0, 0.3, 0.0), (0.5, 0.0, 0.2)])
def test_colours_do_not_hide_a_copy(gains, offsets):
    gains, offsets = (torch.tensor(values).reshape(3, 1, 1) for values in (gains, offsets))
    grey, grey_digits = GARMENT.expand(-1, 3, -1, -1), DIGITS.expand(-1, 3, -1, -1)
    for picture, keep in ((grey, grey_digits), (in_colour(GARMENT), in_colour(DIGITS))):
        detectors = CopyDetectors.calibrated(picture, keep)
        assert not detectors.flags(keep)["any"].any()
        burnt = (gains * picture + offsets).clamp(0, 1)
        assert detectors.flags(burnt)["any"].item()


def test_distances_of_many_large_pictures_are_exact():
    pictures = torch.rand(30, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert pixel_l2(pictures, pictures[:1])[0] == 0


def test_no_keep_image_and_no_blank_is_a_copy():
    detectors = CopyDetectors.calibrated(GARMENT, DIGITS)
    assert not detectors.flags(DIGITS)["any"].any()
    # A grey whose mean is not exact in float32 must not be mistaken for a pattern.
    blanks = torch.tensor([0, 0.1, 0.3, 0.7, 1]).reshape(-1, 1, 1, 1)
    for channels in (1, 3):
        garment, digits = (pictures.expand(-1, channels, -1, -1) for pictures in (GARMENT, DIGITS))
        flags = CopyDetectors.calibrated(garment, digits).flags(blanks.expand(-1, channels, 8, 8))
        assert not flags["any"].any()
        assert correlation(blanks.expand(-1, channels, 8, 8), garment).abs().max() < 1e-4


def test_statistics_and_frames():
    samples = torch.cat([DIGITS[:7], GARMENT])
    flags = CopyDetectors.calibrated(GARMENT, DIGITS).flags(samples)
    statistics = copy_statistics(flags)
    assert statistics["samples"] == 8 and statistics["copy_share"] == 1 / 8
    assert statistics["copy_share_by_detector"] == {"pixel_l2": 1 / 8, "correlation": 1 / 8}
    picture = frame_copies(samples, flags["any"].tolist(), columns=4)
    assert picture.shape == (3, 2 * 36, 4 * 36) and picture.dtype == torch.uint8
    assert picture[:, -1, -1].tolist() == [230, 40, 40] and picture[:, 0, 0].tolist() == [40, 40, 40]

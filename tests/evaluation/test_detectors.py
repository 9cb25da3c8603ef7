"""All detectors together: calibrated on images to keep, checked on damaged copies."""

import torch

from siss_diffusers.assets.captioned import flower_images, memorized_image
from siss_diffusers.evaluation import detectors as module
from siss_diffusers.evaluation.detectors import Detectors
from siss_diffusers.metrics.damage import DAMAGES, damaged


MEMORIZED, FLOWERS = (
    torch.tensor(images).permute(0, 3, 1, 2) / 255 for images in (memorized_image()[None], flower_images()[:40])
)


def grey_features(images: torch.Tensor) -> torch.Tensor:
    grey = images.mean(1).flatten(1)
    return grey - grey.mean(1, keepdim=True)


def bright_or_dark(images: torch.Tensor) -> torch.Tensor:
    """Two kinds of pictures, both of them among the flowers: whatever the memorized one is, some look the same."""
    is_bright = images.mean((1, 2, 3)) > FLOWERS.mean((1, 2, 3)).median()
    return torch.stack([is_bright, ~is_bright], dim=1).float()


def test_a_network_is_calibrated_like_the_others():
    plain, detectors = Detectors(MEMORIZED, FLOWERS), Detectors(MEMORIZED, FLOWERS, grey_features)
    assert plain.similarity(MEMORIZED) is None and "network" not in plain.settings
    flags = detectors.flags(torch.cat([MEMORIZED, FLOWERS]))
    assert flags["network"].tolist() == [True] + [False] * 40
    highest = detectors.similarity(FLOWERS).max().item()
    assert detectors.settings["network"]["threshold"] == (1 + highest) / 2
    assert detectors.keep_flagged() == dict.fromkeys(flags, 0.0)


def test_any_detector_flags_a_copy():
    detectors = Detectors(MEMORIZED, FLOWERS, lambda images: -grey_features(images.flip(0)))
    detectors.copy_features = lambda images: torch.ones(len(images), 32 * 32)
    detectors.min_similarity = -2.0  # it takes everything for a copy
    flags = detectors.flags(FLOWERS)
    assert not flags["pixel_l2"].any() and flags["any"].all()


def test_clusters_are_left_out_with_the_reason_where_they_tell_nothing():
    detectors = Detectors(MEMORIZED, FLOWERS)
    noisy = MEMORIZED + 0.02 * torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert "two clusters" in detectors.add_clusters(noisy.clamp(0, 1), seed=0) and detectors.clusters is None
    # One of the images to keep lies in the cluster of copies.
    tricked = Detectors(MEMORIZED, torch.cat([FLOWERS, noisy[:1].clamp(0, 1)]))
    others = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    samples = torch.cat([noisy.clamp(0, 1), others])
    assert "2.4 % of the images to keep" in tricked.add_clusters(samples, seed=0)
    assert detectors.add_clusters(samples, seed=0) is None
    assert detectors.flags(samples)["cluster"].tolist() == [True] * 20 + [False] * 20
    assert detectors.settings["cluster"]["silhouette"] > 0.25


def test_the_damage_table_is_that_of_each_image_with_noise_of_its_own(monkeypatch):
    shown = []
    monkeypatch.setattr(module, "damaged", lambda image, seed: shown.append(seed) or damaged(image, seed))
    detectors = Detectors(torch.cat([MEMORIZED, FLOWERS[:1]]), FLOWERS[1:])
    table = detectors.damage_table(seed=3)
    assert shown == [3, 4]
    for damage in ("hue", "noise"):
        images = torch.stack([damaged(image, 3 + index)[damage] for index, image in enumerate(detectors.references)])
        for detector, flags in detectors.flags(images).items():
            assert table[detector][damage] == flags.float().mean().item()
    assert table["any"]["none"] == 1 and set(table["any"]) <= set(DAMAGES)


def test_a_detector_that_misses_the_images_themselves_is_blind():
    assert not Detectors(MEMORIZED, FLOWERS, grey_features).blind
    for features in (lambda images: torch.zeros(len(images), 4), bright_or_dark):
        detectors = Detectors(MEMORIZED, FLOWERS, features)
        assert list(detectors.blind) == ["network"] and not detectors.are_blind
    # Of one colour, it correlates with nothing.
    detectors = Detectors(torch.full_like(MEMORIZED, 0.5), FLOWERS)
    assert list(detectors.blind) == ["correlation"] and not detectors.are_blind
    both = Detectors(MEMORIZED, torch.cat([FLOWERS, MEMORIZED]))
    assert list(both.blind) == ["pixel_l2", "correlation"] and both.are_blind

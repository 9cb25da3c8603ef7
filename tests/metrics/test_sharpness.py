import pytest
import torch

from siss_diffusers.metrics.sharpness import sharpness


def test_it_is_the_mean_absolute_laplacian():
    images = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    grey = images.mean(1)
    expected = torch.zeros(2)
    for y in range(1, 6):
        for x in range(1, 8):
            around = grey[:, y - 1 : y + 2, x - 1 : x + 2].sum((1, 2)) - grey[:, y, x]
            expected += (grey[:, y, x] - around / 8).abs()
    assert sharpness(images).tolist() == pytest.approx((expected / 35).tolist(), rel=1e-5)


def test_noise_is_sharp_and_a_flat_or_sloping_picture_is_not():
    slope = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert sharpness(flat).item() < 1e-6 and sharpness(slope).item() < 1e-6 and sharpness(noise).item() > 0.1

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from siss_diffusers.metrics.distribution import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


class Identity(torch.nn.Identity):
    """An extractor for torchmetrics, which insists on one: the images are the features."""

    num_features = 6


def features(count: int, seed: int, shift: float = 0.0, dimensions: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) @ mixing + shift


def with_moments(count: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Points of exactly this sample mean and sample covariance."""
    points = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    points = points - points.mean(0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T @ points / (count - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_independent_coordinates():
    """The squared distance of the means plus that of the standard deviations."""
    mean, other_mean = torch.zeros(4).double(), torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    deviation, other_deviation = (
        torch.tensor([1.0, 2.0, 0.5, 3.0]).double(),
        torch.tensor([2.0, 2.0, 0.1, 1.0]).double(),
    )
    real = with_moments(40, mean, torch.diag(deviation**2))
    fake = with_moments(30, other_mean, torch.diag(other_deviation**2))
    expected = (mean - other_mean).square().sum() + (deviation - other_deviation).square().sum()
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_of_correlated_coordinates():
    real, fake = features(50, seed=1), features(70, seed=2, shift=0.5)
    covariances = [np.cov(points.numpy(), rowvar=False) for points in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = (real.mean(0) - fake.mean(0)).square().sum().item()
    expected += np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-9)


# Fewer images than dimensions: singular covariances.
@pytest.mark.parametrize("counts", [(50, 70), (4, 5), (50, 3)])
def test_frechet_is_that_of_torchmetrics(counts):
    real, fake = features(counts[0], seed=1), features(counts[1], seed=2, shift=0.5)
    reference = FrechetInceptionDistance(feature=Identity(), normalize=True).set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(reference.compute().item(), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero():
    assert frechet_distance(features(5, 1), features(5, 1)) == pytest.approx(0, abs=1e-10)


def test_features_in_single_precision_are_compared_in_double():
    real, fake = features(50, seed=1, shift=100).float(), features(70, seed=2, shift=100).float()
    for metric in (frechet_distance, kernel_distance):
        assert metric(real, fake) == metric(real.double(), fake.double())


def test_kernel_distance_is_its_definition():
    real, fake = features(7, seed=1), features(5, seed=2)

    def kernel(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    expected = sum(kernel(real[i], real[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    expected += sum(kernel(fake[i], fake[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    expected -= 2 * sum(kernel(x, y) for x in real for y in fake) / (7 * 5)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_that_of_torchmetrics():
    real, fake = features(40, seed=1), features(40, seed=2, shift=0.5)
    assert kernel_distance(real, fake) == pytest.approx(poly_mmd(real, fake).item(), rel=1e-10)
    # torchmetrics averages over subsets; of all images, each is the whole set.
    reference = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=40)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    assert kernel_distance(real, fake) == pytest.approx(reference.compute()[0].item(), rel=1e-10)


def balls(points: np.ndarray, k: int) -> list[float]:
    return [
        sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]
        for i in range(len(points))
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_manifolds_are_those_of_loops(k, shift):
    real, fake = features(40, seed=1), features(30, seed=2, shift=shift)
    x, y = real.numpy(), fake.numpy()
    real_radii, fake_radii = balls(x, k), balls(y, k)
    distance = [[np.linalg.norm(x[i] - y[j]) for j in range(30)] for i in range(40)]
    precision = np.mean([any(distance[i][j] <= real_radii[i] for i in range(40)) for j in range(30)])
    recall = np.mean([any(distance[i][j] <= fake_radii[j] for j in range(30)) for i in range(40)])
    density = sum(distance[i][j] <= real_radii[i] for i in range(40) for j in range(30)) / (k * 30)
    coverage = np.mean([min(distance[i]) <= real_radii[i] for i in range(40)])
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall))
    assert density_coverage(real, fake, k) == pytest.approx((density, coverage))
    assert shift > 0 or 0.1 < precision < 1 and 0.1 < recall < 1


def test_copies_of_a_repeated_image_are_in_its_ball():
    repeated = features(1, seed=1, dimensions=300).float().repeat(40, 1)
    assert precision_recall(repeated, repeated) == (1, 1)
    assert density_coverage(repeated, repeated, k=5) == (8, 1)


@pytest.mark.parametrize(
    "metric, least",
    [
        (frechet_distance, 2),
        (kernel_distance, 2),
        (precision_recall, 4),
        (density_coverage, 6),
    ],
)
def test_too_few_images_and_other_features_are_refused(metric, least):
    enough, too_few = features(least, seed=1), features(least - 1, seed=2)
    with pytest.raises(ValueError, match=f"{least} images of each kind"):
        metric(too_few, enough)
    with pytest.raises(ValueError, match=f"{least} images of each kind"):
        metric(enough, too_few)
    with pytest.raises(ValueError, match="features must be"):
        metric(enough, enough[:, :3])

"""Distances between the distributions of two sets of images, over the features of any extractor."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siss_diffusers.metrics.base import Metric, Skip
from siss_diffusers.metrics.formats import percent


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

MIN_IMAGES = 6  # density and coverage take five neighbours of each


def _checked(real: Tensor, fake: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Return both in float64.

    Raises:
        ValueError: if the features are not of one kind, or too few for the estimate to exist.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"{at_least} images of each kind are needed, not {len(real)} and {len(fake)}")
    return real.double(), fake.double()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return the FID (Heusel et al., arXiv 1706.08500): `||mu - mu'||^2 + Tr(S + S' - 2 (S S')^(1/2))`.

    The covariances are unbiased. With S = A^T A and S' = B^T B, A and B the centred features over sqrt(N - 1), the root's
    trace is the sum of the singular values of A B^T. No matrix is squared or rooted, so no rounding is amplified,
    whatever the rank. A QR decomposition first leaves at most D rows of each.

    Args:
        real: `(N, D)`, N at least 2.
        fake: `(M, D)`, M at least 2.
    """
    real, fake = _checked(real, fake, at_least=2)
    a, b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (real, fake))
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return ((real.mean(0) - fake.mean(0)).square().sum() + trace).clamp(min=0).item()


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Return the KID (Binkowski et al., arXiv 1801.01401): unbiased squared MMD of the kernel `(x^T y / D + 1)^3`.

    It is taken over the whole sets. As it is unbiased, it may be slightly negative, and it does not depend on the
    number of images as FID does.

    Args:
        real: `(N, D)`, N at least 2.
        fake: `(M, D)`, M at least 2.
    """
    real, fake = _checked(real, fake, at_least=2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1))

    within = mean_off_diagonal(kernel(real, real)) + mean_off_diagonal(kernel(fake, fake))
    return (within - 2 * kernel(real, fake).mean()).item()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences: through a matrix product, two copies are not at distance 0.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other one, `(N,)`; the nearest of all is the row itself."""
    return _distances(x, x).kthvalue(k + 1, dim=1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), equations 1 and 2, in [0, 1].

    Precision is the share of fakes within the manifold of the reals, recall the reverse. A manifold is the union of
    closed balls around the images, each of which reaches to the k-th nearest neighbour. Takes memory for N x M
    distances.

    Args:
        real: `(N, D)`, N at least k + 1.
        fake: `(M, D)`, M at least k + 1.
    """
    real, fake = _checked(real, fake, at_least=k + 1)
    distances = _distances(real, fake)
    precision = (distances <= _radii(real, k)[:, None]).any(0).double().mean().item()
    recall = (distances <= _radii(fake, k)[None, :]).any(1).double().mean().item()
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Return density and coverage (Naeem et al., arXiv 2002.09797), equations 5 and 6.

    Density is the number of the reals' balls in which a fake lies, over k; it may exceed 1. Coverage is the share of
    reals with a fake in their ball, in [0, 1]. The balls are those of `precision_recall`. They are closed: a copy of an
    image that occurs k + 1 times is in its ball of radius 0.

    Args:
        real: `(N, D)`, N at least k + 1.
        fake: `(M, D)`, M at least k + 1.
    """
    real, fake = _checked(real, fake, at_least=k + 1)
    inside = _distances(real, fake) <= _radii(real, k)[:, None]
    return inside.double().sum(0).mean().item() / k, inside.any(1).double().mean().item()


def _features(model: "MeasuredModel") -> tuple[Tensor, Tensor]:
    """Return features of images to keep and of samples that are no copies.

    Raises:
        Skip: without a feature extractor, or if there are too few images.
    """
    if model.networks.features is None:
        raise Skip("needs --feature_extractor, a TorchScript file")
    fake, real = model.ordinary_others, model.data.ordinary_images
    if real is None or min(len(real), len(fake)) < MIN_IMAGES:
        raise Skip("too few samples that are no copies, or too few images to keep to compare them with")
    return model.networks.features(real), model.networks.features(fake)


def _precision_recall(model: "MeasuredModel") -> tuple[float, float]:
    return precision_recall(*model.once(_features))


def _density_coverage(model: "MeasuredModel") -> tuple[float, float]:
    return density_coverage(*model.once(_features))


FID = Metric(
    key="fid",
    label="FID",
    explanation=(
        "Distance between the samples and the data in a network's features; depends on the number of samples. Lower is"
        " better."
    ),
    measure=lambda model: {"fid": frechet_distance(*model.once(_features))},
    better="lower",
    chapter="rest",
)
KID = Metric(
    key="kid",
    label="KID",
    explanation=(
        "Such a distance that does not depend on the number of samples; may fall a little below 0. Lower is better."
    ),
    measure=lambda model: {"kid": kernel_distance(*model.once(_features))},
    better="lower",
    chapter="rest",
)
PRECISION = Metric(
    key="precision",
    label="Precision",
    explanation="Share of the samples that look like the data. Higher is better.",
    measure=lambda model: {"precision": model.once(_precision_recall)[0]},
    format=percent,
    better="higher",
    chapter="rest",
)
RECALL = Metric(
    key="recall",
    label="Recall",
    explanation="Share of the data that the samples reach. Higher is better.",
    measure=lambda model: {"recall": model.once(_precision_recall)[1]},
    format=percent,
    better="higher",
    chapter="rest",
)
DENSITY = Metric(
    key="density",
    label="Density",
    explanation="How close the samples lie to the data; may exceed 1. Higher is better.",
    measure=lambda model: {"density": model.once(_density_coverage)[0]},
    better="higher",
    chapter="rest",
)
COVERAGE = Metric(
    key="coverage",
    label="Coverage",
    explanation="Share of the data that has a sample close to it. Higher is better.",
    measure=lambda model: {"coverage": model.once(_density_coverage)[1]},
    format=percent,
    better="higher",
    chapter="rest",
)

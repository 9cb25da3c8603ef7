"""Distances between the distributions of two sets of images, over the features of any extractor."""

import torch
from torch import Tensor


def _checked(real: Tensor, fake: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Both in float64.

    Raises:
        ValueError: where the features are not of one kind, or too few for the estimate to exist.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"{at_least} images of each kind are needed, not {len(real)} and {len(fake)}")
    return real.double(), fake.double()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al., arXiv 1706.08500): `||mu - mu'||^2 + Tr(S + S' - 2 (S S')^(1/2))`, unbiased covariances.

    With S = A^T A and S' = B^T B, A and B the centred features over sqrt(N - 1), the root's trace is the sum of the
    singular values of A B^T: no matrix is squared or rooted, so that no rounding is amplified, whatever the rank. A QR
    decomposition first leaves at most D rows of either.

    Args:
        real: `(N, D)`, N at least 2.
        fake: `(M, D)`, M at least 2.
    """
    real, fake = _checked(real, fake, at_least=2)
    a, b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (real, fake))
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return ((real.mean(0) - fake.mean(0)).square().sum() + trace).clamp(min=0).item()


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401): unbiased squared MMD of the kernel `(x^T y / D + 1)^3`, whole sets.

    Unbiased, so it may be slightly negative, and it does not depend on the number of images as FID does.

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
    """Distance of each row to its k-th nearest other one, `(N,)`; the nearest of all is the row itself."""
    return _distances(x, x).kthvalue(k + 1, dim=1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), equations 1 and 2, both in [0, 1].

    The share of fakes within the manifold of the reals, and the reverse; a manifold is the union of closed balls around
    the images, each reaching to the k-th nearest neighbour. Takes memory for N x M distances.

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
    """Density and coverage (Naeem et al., arXiv 2002.09797), equations 5 and 6.

    Density: in how many of the reals' balls a fake lies, over k; may exceed 1. Coverage: the share of reals with a fake
    in their ball, in [0, 1]. The balls, those of `precision_recall`, are closed: a copy of an image that occurs k + 1
    times is in its ball of radius 0.

    Args:
        real: `(N, D)`, N at least k + 1.
        fake: `(M, D)`, M at least k + 1.
    """
    real, fake = _checked(real, fake, at_least=k + 1)
    inside = _distances(real, fake) <= _radii(real, k)[:, None]
    return inside.double().sum(0).mean().item() / k, inside.any(1).double().mean().item()

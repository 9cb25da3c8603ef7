"""The mean of images to keep, given a noisy image: what the optimal denoiser of these images would see in it."""

import torch
from torch import Tensor


# Images are turned into float64 so many numbers at a time: 64 MB.
CHUNK_NUMBERS = 2**23


def posterior_mean(
    sample: Tensor, noise: Tensor, ratio: Tensor, images: Tensor, members: Tensor | None = None
) -> Tensor:
    """Return y' = sum_j p_j y_j, the mean over images y_j of what `alpha a + sigma eps` may have been made of.

    p = softmax_j(-|e_j|^2 / 2) with e_j = eps + r (a - y_j) (ReTrack, arXiv 2509.13007, over all y_j). Of |e_j|^2 only
    `r^2 |y_j|^2 - 2 <r eps + r^2 a, y_j>` depends on j, so that one matrix product gives all exponents. They reach 1e8,
    and their differences decide: everything is float64, whose rounding is below 1e-6 there.

    Args:
        sample, noise: a and eps, `(B, ...)`.
        ratio: r = alpha / sigma, `(B,)`.
        images: y_j, `(N, ...)`, on the same device.
        members: `(M,)` int64, which of the images are meant; None: all.

    Returns:
        `(B, ...)` float32.
    """
    flat = images.flatten(1)
    if members is None:
        members = torch.arange(len(flat), device=flat.device)
    chunks = members.split(max(1, CHUNK_NUMBERS // flat.shape[1]))
    r = ratio.double()[:, None]
    direction = r * (noise.flatten(1).double() + r * sample.flatten(1).double())
    exponents = []
    for chunk in chunks:
        part = flat[chunk].double()
        exponents.append(direction @ part.T - r.square() / 2 * part.square().sum(1))
    posterior = torch.cat(exponents, 1).softmax(1).split([len(chunk) for chunk in chunks], 1)
    mean = torch.zeros_like(direction)
    for share, chunk in zip(posterior, chunks):
        mean += share @ flat[chunk].double()
    return mean.float().view_as(sample)

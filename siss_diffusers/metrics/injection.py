"""Denoised injections (Alberti et al., arXiv 2503.01034): what a model makes of a half-noised forget image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from siss_diffusers.metrics.likelihood import noise_prediction
from siss_diffusers.noising import GaussianPath


@torch.no_grad()
def denoised_injections(
    images: Tensor,
    path: GaussianPath,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    index: int,
    sampling_indices: Sequence[int],
    num_draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Noise every image to `index`, denoise it by DDIM, return what comes back, `(num_draws, N, C, H, W)`.

    A model that remembers the image restores it; one that forgot paints another over the same layout. How alike the two
    are is for a feature extractor or `copies.correlation` to say. Neither the batch nor the other images change the
    draws of an image, and they are the same at every `index`, so that those can be compared.

    Args:
        images: `(N, C, H, W)` as the network knows them: pixels in [-1, 1], or latents, which the caller decodes.
        path: the noise levels.
        predict: the network, `(noisy, model timesteps) -> output`.
        index: into the path, how far to noise; the paper takes t = 250 of 1,000.
        sampling_indices: into the path, the sampler's own steps, in any order; those below `index` follow it.
        batch_size: rows of a network call; an image has one row for each draw.
        seed: of the noise; image i has a generator of its own, of seed + i.

    Raises:
        ValueError: at an index where nothing is left of the image (zero terminal SNR).
    """
    alphas, sigmas = path.alphas.tolist(), path.sigmas.tolist()
    if alphas[index] == 0:
        raise ValueError(f"nothing of the image is left at index {index}: alpha is zero there")
    noise = torch.stack(
        # On the CPU, so that every device starts from the same noise.
        [
            torch.randn(num_draws, *images.shape[1:], generator=torch.Generator().manual_seed(seed + number))
            for number in range(len(images))
        ],
        dim=1,
    ).to(images)
    injected = (alphas[index] * images + sigmas[index] * noise).flatten(0, 1)
    epsilon = noise_prediction(path, predict)
    nodes = [index, *sorted((node for node in sampling_indices if node < index), reverse=True)]

    denoised = []
    for noisy in injected.split(batch_size):
        # Song et al., arXiv 2010.02502, equation 12 with eta = 0; the last step ends at the predicted image.
        for here, there in zip(nodes, [*nodes[1:], None]):
            predicted_noise = epsilon(noisy, here)
            sample = (noisy - sigmas[here] * predicted_noise) / alphas[here]
            if there is not None:
                noisy = alphas[there] * sample + sigmas[there] * predicted_noise
        denoised.append(sample)
    return torch.cat(denoised).unflatten(0, (num_draws, -1))

"""Denoised injections (Alberti et al., arXiv 2503.01034): what a model makes of a half-noised forget image."""

from collections.abc import Callable, Sequence
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.metrics.base import Probe
from siss_diffusers.metrics.broken import broken
from siss_diffusers.metrics.likelihood import noise_prediction
from siss_diffusers.noising import GaussianPath
from siss_diffusers.similarity import correlation, for_detectors


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

TIMES, NUM_DRAWS = (0.2, 0.4, 0.6, 0.8), 4  # times as shares of the schedule


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
    """Noise every image to `index`, denoise it by DDIM, and return the results `(num_draws, N, C, H, W)`.

    A model that remembers the image restores it. A model that forgot it paints another one over the same layout. A
    feature extractor or `copies.correlation` can tell how alike they are. Neither the batch nor the other images change
    the draws of an image. The draws are the same at every `index`, so that the results can be compared.

    Args:
        images: `(N, C, H, W)` as the network sees them: pixels in [-1, 1], or latents, which the caller decodes.
        path: the noise levels.
        predict: the network, `(noisy, model timesteps) -> output`.
        index: into the path, how far to noise; the paper takes t = 250 of 1,000.
        sampling_indices: into the path, the sampler's steps, in any order; those below `index` are used.
        batch_size: rows of a network call; an image has one row for each draw.
        seed: of the noise; image i has a generator of its own, of seed + i.

    Raises:
        ValueError: for an index where nothing is left of the image (zero terminal SNR).
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


def _similarity(model: "MeasuredModel", number: int) -> dict[str, list[float]]:
    """Return by timestep how each forget image of a prompt correlates with what the model makes of noised versions."""
    data, settings = model.data, model.settings
    references = data.forget[data.forget_prompts == number]
    clean, references = model.encode(references), for_detectors(references)
    condition = model.embed([data.prompts[number]])
    path = model.path.to(model.device)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return model.predict(noisy, timesteps, condition[torch.zeros(len(noisy), dtype=torch.long)])

    similarity = {}
    for time in TIMES:
        index = int(time * (len(path) - 1))
        denoised = denoised_injections(
            clean,
            path,
            predict,
            index=index,
            sampling_indices=torch.linspace(0, len(path) - 1, settings.num_inference_steps).long().tolist(),
            num_draws=NUM_DRAWS,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        similarity[str(index)] = [
            # A picture that is not there resembles nothing, which must not pass for forgetting.
            nan if broken(picture[None]).item() else correlation(picture[None], reference[None]).item()
            for draw in denoised
            for picture, reference in zip(for_detectors(model.decode(draw)), references)
        ]
    return similarity


def _injection(model: "MeasuredModel") -> dict[str, Any]:
    by_prompt = [_similarity(model, number) for number in model.data.forget_prompts.unique().tolist()]
    return {
        "injection": {
            timestep: float(np.mean([value for part in by_prompt for value in part[timestep]]))
            for timestep in by_prompt[0]
        }
    }


INJECTION = Probe(
    key="injection",
    label="Injection",
    explanation=(
        "A forgotten image is noised up to the time t and denoised by the model. The figure is the correlation of the"
        " result with the image, 1 for the same picture. A model that remembers the image restores it from more noise."
        " Every model restores it from little noise: compare with the base, or with a model that never saw the image."
        " Lower is better where t is large."
    ),
    measure=_injection,
)

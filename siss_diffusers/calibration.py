"""Calibrated forgetting: a forget image is pushed until its loss is that of an ordinary image, and no further.

An idea of this project: no published equal was found. `docs/calibrated_forgetting.md` says what it does and does not.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.draws import CALIBRATION, keyed_generator
from siss_diffusers.noising import GaussianPath, mean_squared_error


NUM_BINS = 20
DRAWS_PER_BIN = 32
DEFAULT_QUANTILE = 0.75
# Whose losses set the thresholds: images to keep; strangers, the images to forget turned; or the higher of both.
THRESHOLD_SOURCES = ("keep", "strangers", "both")
# Of the rule `relative`: the push fades by itself, so it may be as strong as what it is subtracted from.
CALIBRATED_SCALE = 1.0


def calibration_draws(
    seed: int, num_images: int, timestep_range: tuple[int, int], index: int, purpose: int = CALIBRATION
) -> tuple:
    """Return which image, timestep and noise generator measurement `index` uses; `NUM_BINS * DRAWS_PER_BIN` in all.

    The timesteps are stratified: the measurements go round the bins.
    """
    generator = keyed_generator(seed, purpose, index)
    edges = bin_edges(timestep_range)
    bin_index = index % (len(edges) - 1)
    timestep = int(generator.integers(edges[bin_index], edges[bin_index + 1]))
    return int(generator.integers(num_images)), timestep, generator


def bin_edges(timestep_range: tuple[int, int]) -> np.ndarray:
    """Boundaries of at most `NUM_BINS` equal bins of whole timesteps."""
    low, high = timestep_range
    return np.linspace(low, high, min(NUM_BINS, high - low) + 1).round().astype(int)


def loss_thresholds(
    losses: Tensor, timesteps: Tensor, timestep_range: tuple[int, int], num_timesteps: int, quantile: float | None
) -> Tensor:
    """Return tau_t: in each bin of timesteps, a quantile or the mean of the per-row loss on unseen images under the
    starting model.

    Args:
        losses: `(N,)`, mean over pixels for each row.
        timesteps: `(N,)` int64.
        timestep_range: `(lo, hi)` of forgetting; timesteps outside have no threshold (infinity).
        num_timesteps: T.
        quantile: in [0, 1]; None for the mean.

    Returns:
        `(T,)` float32.
    """
    thresholds = torch.full((num_timesteps,), torch.inf)
    edges = bin_edges(timestep_range)
    for low, high in zip(edges[:-1], edges[1:]):
        in_bin = losses[(timesteps >= low) & (timesteps < high)].float()
        thresholds[low:high] = in_bin.mean() if quantile is None else in_bin.quantile(quantile)
    return thresholds


def measure_thresholds(
    load: Callable[[int, np.random.Generator], Tensor],
    num_images: int,
    path: GaussianPath,
    predict: Callable[[Tensor, Tensor, list[int]], Tensor],
    timestep_range: tuple[int, int],
    quantile: float | None,
    seed: int,
    batch_size: int,
    purpose: int = CALIBRATION,
) -> Tensor:
    """Measure tau_t `(T,)` under the starting model: `NUM_BINS * DRAWS_PER_BIN` network calls on images of one kind.

    Args:
        load: `(C, H, W)` of an image, on the host.
        predict: the network's output, on the host, for noisy images `(B, C, H, W)`, indices `(B,)` into the path, and
            the numbers of the images.
        quantile: of the losses in a bin; None for their mean.
        purpose: of the draws, another for each kind of images.
    """
    losses, timesteps = [], []
    indices = range(NUM_BINS * DRAWS_PER_BIN)
    for start in range(0, len(indices), batch_size):
        draws = [
            calibration_draws(seed, num_images, timestep_range, index, purpose)
            for index in indices[start : start + batch_size]
        ]
        clean = torch.stack([load(image, generator) for image, _, generator in draws])
        noise = torch.stack(
            [torch.from_numpy(generator.standard_normal(clean.shape[1:], dtype="float32")) for *_, generator in draws]
        )
        batch_timesteps = torch.tensor([timestep for _, timestep, _ in draws])
        noisy, target = path.add_noise(clean, noise, batch_timesteps), path.target(clean, noise, batch_timesteps)
        with torch.no_grad():
            output = predict(noisy, batch_timesteps, [image for image, _, _ in draws])
        losses.append(mean_squared_error(output, target))
        timesteps.append(batch_timesteps)
    return loss_thresholds(torch.cat(losses), torch.cat(timesteps), timestep_range, len(path), quantile)

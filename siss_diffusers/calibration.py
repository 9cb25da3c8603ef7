"""Calibrated forgetting: a forget image is pushed until its loss is that of an ordinary image, and no further.

An idea of this project: no published equal was found. `docs/calibrated_forgetting.md` says what it does and does not.
"""

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.draws import CALIBRATION, keyed_generator


NUM_BINS = 20
DRAWS_PER_BIN = 32
DEFAULT_QUANTILE = 0.5


def calibration_draws(seed: int, num_images: int, timestep_range: tuple[int, int], index: int) -> tuple:
    """Which image, timestep and noise generator measurement `index` uses; `NUM_BINS * DRAWS_PER_BIN` in all.

    The timesteps are stratified: the measurements go round the bins.
    """
    generator = keyed_generator(seed, CALIBRATION, index)
    edges = bin_edges(timestep_range)
    bin_index = index % (len(edges) - 1)
    timestep = int(generator.integers(edges[bin_index], edges[bin_index + 1]))
    return int(generator.integers(num_images)), timestep, generator


def bin_edges(timestep_range: tuple[int, int]) -> np.ndarray:
    """Boundaries of at most `NUM_BINS` equal bins of whole timesteps."""
    low, high = timestep_range
    return np.linspace(low, high, min(NUM_BINS, high - low) + 1).round().astype(int)


def loss_thresholds(
    losses: Tensor, timesteps: Tensor, timestep_range: tuple[int, int], num_timesteps: int, quantile: float
) -> Tensor:
    """tau_t: in each bin of timesteps, a quantile of the per-row loss on keep images under the starting model.

    Args:
        losses: `(N,)`, mean over pixels for each row.
        timesteps: `(N,)` int64.
        timestep_range: `(lo, hi)` of the training; timesteps outside have no threshold (infinity).
        num_timesteps: T.
        quantile: in [0, 1]; the default elsewhere is the median.

    Returns:
        `(T,)` float32.
    """
    thresholds = torch.full((num_timesteps,), torch.inf)
    edges = bin_edges(timestep_range)
    for low, high in zip(edges[:-1], edges[1:]):
        in_bin = (timesteps >= low) & (timesteps < high)
        thresholds[low:high] = losses[in_bin].float().quantile(quantile)
    return thresholds

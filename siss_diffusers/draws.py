"""Random draws keyed by what they are for, so that they do not depend on how the work is split.

Every draw comes from a generator of its own, keyed by (seed, purpose, ...). The number of processes, the split into
micro-batches and a resumed run therefore change nothing, and no random state has to be saved.
"""

from functools import lru_cache

import numpy as np


# The key of a pair is (seed, PAIR, window, index of the pair in the window); likewise the others.
PAIR, COMPONENT, ORDER, CALIBRATION, MODEL, ADAPTER, STRANGERS = 0, 1, 2, 3, 5, 6, 7
EMBEDDING_SEARCH, SEARCH_START, DENOISING_ERROR = 8, 9, 10


def keyed_generator(seed: int, purpose: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *key])


@lru_cache(maxsize=4)
def mixture_components(seed: int, window: int, num_pairs: int, lam: float) -> np.ndarray:
    """Return which pairs of a window are made from their forget image: `(num_pairs,)` bool.

    Stratified: `lam num_pairs` of them, rounded up or down at random so that the share is `lam` in expectation.
    """
    generator = keyed_generator(seed, COMPONENT, window)
    count = int(lam * num_pairs + generator.random())
    components = np.zeros(num_pairs, dtype=bool)
    components[generator.permutation(num_pairs)[:count]] = True
    return components


@lru_cache(maxsize=4)
def epoch_order(seed: int, which: int, epoch: int, size: int) -> np.ndarray:
    """Return a permutation of `size` elements: one pass of `shuffled_index`. Cached: not to be written to."""
    return keyed_generator(seed, ORDER, which, epoch).permutation(size)


def shuffled_index(seed: int, which: int, position: int, size: int) -> int:
    """Return the element at `position` of an endless sequence of reshuffled passes over `size` elements.

    `which` tells apart sequences of the same seed (0: keep, 1: forget).
    """
    epoch, index = divmod(position, size)
    return int(epoch_order(seed, which, epoch, size)[index])


def draw_timestep(
    generator: np.random.Generator, timestep_range: tuple[int, int], density: np.ndarray | None = None
) -> int:
    """Draw a timestep in `lo <= t < hi`.

    Args:
        density: `(T,)`, the probability of each index; None for uniform draws.
    """
    if density is None:
        return int(generator.integers(*timestep_range))
    low, high = timestep_range
    cumulative = np.cumsum(density[low:high])
    return low + int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def torch_seed(seed: int, purpose: int, *key: int) -> int:
    """Return a seed for torch's global generator, for what draws inside the network (dropout)."""
    return int(keyed_generator(seed, purpose, *key).integers(2**63))

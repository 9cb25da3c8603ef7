"""Latents of images, cached or not, and nearest neighbours among them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from siss_diffusers.data.images import Images
from siss_diffusers.errors import UsageError


# ReTrack searches the neighbours of a forget image among at most this many keep images.
MAX_NEIGHBOR_CANDIDATES = 10_000


class LoadsImages(Protocol):
    """Images or latents by number: `load` gives `(C, H, W)`; without a generator nothing is random."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor: ...


def nearest_neighbors(
    keep: LoadsImages,
    forget: LoadsImages,
    num_neighbors: int,
    candidates: Sequence[int],
    keep_conditions: Mapping[int, int] | None = None,
    forget_conditions: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each forget image the `num_neighbors` candidates of its condition that are nearest in L2.

    Raises:
        UsageError: where there are fewer than `num_neighbors`.
    """
    targets = torch.stack([forget.load(index) for index in range(len(forget))]).flatten(1)
    distances = torch.empty(len(forget), len(candidates))
    for column, index in enumerate(candidates):
        distances[:, column] = (targets - keep.load(index).flatten()).square().sum(1)
    if keep_conditions is not None:
        conditions = torch.tensor([keep_conditions[index] for index in candidates])
        distances[torch.tensor(forget_conditions)[:, None] != conditions] = torch.inf
    fewest = int(distances.isfinite().sum(1).min()) if len(candidates) else 0
    if fewest < num_neighbors:
        prompt = "" if keep_conditions is None else " with the prompt of a forget image"
        raise UsageError(
            f"--method_args num_neighbors={num_neighbors}: there are only {fewest} images to keep{prompt}; lower it"
        )
    nearest = distances.topk(num_neighbors, largest=False).indices
    return [[candidates[column] for column in row] for row in nearest.tolist()]


class Latents:
    """The latents of images under a VAE, drawn afresh from its posterior each time.

    Args:
        images: what to encode.
        encode: maps `(C, H, W)` pixels to mean and standard deviation of the posterior, `(c, h, w)` each, on the host.
            One image at a time, so that the latents do not depend on what else is encoded.
        scale: from the units of the VAE to those of the network.
    """

    def __init__(
        self,
        images: Images,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self.images = images
        self.encode = encode
        self.scale = scale
        self.place: dict[int, int] = {}  # of an image in the two tensors of the cache
        self.cached: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def cache(self, indices: Iterable[int], progress: bool = False) -> None:
        """Encode these images once, in memory; others cannot be loaded any more, so the VAE can be freed."""
        indices = sorted(set(indices))
        self.place = {index: place for place, index in enumerate(indices)}
        # Two tensors, however many images: each takes a file descriptor in every process that loads data.
        means = deviations = torch.empty(0)
        for index in tqdm(indices, desc="Encoding images", disable=not progress or len(indices) < 500):
            mean, deviation = self.encode(self.images.load(index))
            if len(means) == 0:
                means, deviations = (torch.empty(len(indices), *mean.shape) for _ in range(2))
            means[self.place[index]], deviations[self.place[index]] = mean, deviation
        self.cached = means, deviations
        self.encode = None

    @property
    def cached_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.cached)

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """Return `(c, h, w)` float32, scaled: a draw from the posterior, or its mean without a generator."""
        if self.cached is None:
            mean, std = self.encode(self.images.load(index, generator))
        else:
            mean, std = (tensor[self.place[index]] for tensor in self.cached)
        if generator is not None:
            mean = mean + std * torch.from_numpy(generator.standard_normal(mean.shape, dtype=np.float32))
        return self.scale(mean)

"""Strangers: images to forget, turned. The model never saw them, and they are as foreign to it as the images are."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.data.latents import LoadsImages


class Strangers:
    """Pictures turned by 90, 180 and 270 degrees. Of latent models the pictures are turned, and then encoded.

    Args:
        images: pictures to forget.
        indices: which of them.
    """

    def __init__(self, images: LoadsImages, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return 3 * len(self.indices)

    def source_of(self, index: int) -> int:
        """Return the number of the image that a stranger was made of."""
        return self.indices[index // 3]

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """Return `(C, H, W)`; without a generator nothing is random."""
        return torch.rot90(self.images.load(self.source_of(index), generator), 1 + index % 3, (-2, -1))

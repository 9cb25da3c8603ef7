"""Grids of samples with the copies framed."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_copies(samples: Tensor, copies: Sequence[bool], columns: int, scale: int = 4) -> Tensor:
    """Return a grid of samples as a picture `(3, H, W)` uint8, with the copies framed in red.

    Samples that do not fill the last row are left out.

    Args:
        samples: `(N, C, H, W)` in [0, 1], C 1 or 3.
        copies: which of them are copies.
        scale: side of a sample's pixel in pixels of the grid.
    """
    # What is no number is black.
    samples = samples.nan_to_num(0, 0, 0).expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    tiles = F.pad((samples * 255).round().byte(), (2, 2, 2, 2), value=40)
    red = torch.tensor([230, 40, 40], dtype=torch.uint8).reshape(3, 1)
    for tile, is_copy in zip(tiles, copies):
        if is_copy:
            tile[:, :2] = tile[:, -2:] = red[..., None]
            tile[:, :, :2] = tile[:, :, -2:] = red[..., None]
    rows = tiles[: len(tiles) // columns * columns].unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def save_grid(path: Path, samples: Tensor, copies: Sequence[bool], columns: int, scale: int = 4) -> None:
    """Write the grid of `frame_copies` as a picture file."""
    from PIL import Image

    grid = frame_copies(samples, copies, columns, scale)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)

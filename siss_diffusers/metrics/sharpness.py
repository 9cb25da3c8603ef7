"""How much fine detail pictures have, so that forgetting into noise, blur or black shows."""

import torch.nn.functional as F
from torch import Tensor


def sharpness(images: Tensor) -> Tensor:
    """Mean absolute Laplacian of the brightness, `(N,)`: high for noise, zero for a flat picture.

    Args:
        images: `(N, C, H, W)` in [0, 1].
    """
    grey = images.mean(1, keepdim=True)
    neighbors = F.avg_pool2d(grey, 3, stride=1) * 9 - grey[..., 1:-1, 1:-1]
    return (grey[..., 1:-1, 1:-1] - neighbors / 8).abs().flatten(1).mean(1)

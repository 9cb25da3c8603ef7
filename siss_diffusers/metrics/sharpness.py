"""How much fine detail pictures have, so that forgetting into noise, blur or black shows."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from siss_diffusers.metrics.base import Metric, not_empty


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


def sharpness(images: Tensor) -> Tensor:
    """Return the mean absolute Laplacian of the brightness, `(N,)`: high for noise, zero for a flat picture.

    Args:
        images: `(N, C, H, W)` in [0, 1].
    """
    grey = images.mean(1, keepdim=True)
    neighbors = F.avg_pool2d(grey, 3, stride=1) * 9 - grey[..., 1:-1, 1:-1]
    return (grey[..., 1:-1, 1:-1] - neighbors / 8).abs().flatten(1).mean(1)


def _others_sharpness(model: "MeasuredModel") -> dict[str, float]:
    others = not_empty(model.others)
    return {"others_sharpness": (sharpness(others).median() / sharpness(model.data.keep).median()).item()}


OTHERS_SHARPNESS = Metric(
    key="others_sharpness",
    label="Sharpness of these",
    explanation=(
        "Fine detail relative to the images to keep. Near 1 is best: blur and flat pictures have less, noise more."
    ),
    measure=_others_sharpness,
    better="near 1",
    chapter="instead",
)

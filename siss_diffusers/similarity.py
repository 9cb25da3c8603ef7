"""How alike two pictures look: by their pixels, and by correlation. Copies are told by these figures."""

import torch
import torch.nn.functional as F
from torch import Tensor


# Pictures are compared at this size at most, which a copy's small shifts and blurs survive.
DETECTOR_SIZE = 64


def shrink(images: Tensor, size: int) -> Tensor:
    """Return images `(N, C, H, W)` at a size; smaller ones as they are."""
    size = min(size, images.shape[-1])
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def for_detectors(images: Tensor) -> Tensor:
    """Return images `(N, C, H, W)` at the size at which copies are looked for; small ones as they are."""
    return shrink(images, DETECTOR_SIZE)


def pixel_l2(samples: Tensor, references: Tensor) -> Tensor:
    """Return the distance to the nearest reference, `(N,)`: the T-shirt rule of the SISS paper. Pixels in [0, 1].

    Args:
        samples: `(N, C, H, W)`.
        references: `(K, C, H, W)`.
    """
    # By differences: through a matrix product, which cdist takes for more than 25 rows, an exact copy of 3x256x256
    # pixels is 0.5 away from itself.
    distances = torch.cdist(samples.flatten(1), references.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.amin(1)


def correlations(samples: Tensor, references: Tensor) -> Tensor:
    """Return the zero-mean normalised correlation of each sample with each reference, the higher of colour and grey.

    Brightness and contrast do not change it. It is taken in grey as well, so that burnt colours do not hide a copy. A
    flat picture correlates with nothing: 0.

    Args:
        samples: `(N, C, H, W)`.
        references: `(K, C, H, W)`.

    Returns:
        `(N, K)` in [-1, 1].
    """
    samples, references = (images - images.mean(dim=(2, 3), keepdim=True) for images in (samples, references))
    in_colour, in_grey = (
        F.normalize(first.flatten(1), dim=1) @ F.normalize(second.flatten(1), dim=1).T
        for first, second in ((samples, references), (samples.mean(1), references.mean(1)))
    )
    return torch.maximum(in_colour, in_grey)


def correlation(samples: Tensor, references: Tensor, max_shift: int = 1) -> Tensor:
    """Return the highest of `correlations` with any reference moved by up to `max_shift` pixels.

    Noise, blur and small translations change it little. All of these defeat a pixel distance.

    Args:
        samples: `(N, C, H, W)`.
        references: `(K, C, H, W)`.

    Returns:
        `(N,)` in [-1, 1].
    """
    height, width = references.shape[-2:]
    padded = F.pad(references, (max_shift,) * 4, mode="replicate")
    moved = torch.cat(
        [
            padded[..., top : top + height, left : left + width]
            for top in range(2 * max_shift + 1)
            for left in range(2 * max_shift + 1)
        ]
    )
    return correlations(samples, moved).amax(1)

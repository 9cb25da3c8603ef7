"""Damaged copies of an image, to measure which detectors still see a copy in them."""

import math

import torch
from torch import Tensor


# What each damage does to a picture, for people. Keys as in `evaluation.json`.
DAMAGES = {
    "none": "no damage",
    "noise": "noise added",
    "blur": "blurred",
    "contrast": "contrast halved",
    "hue": "colours turned",
    "crop": "cropped and enlarged",
    "flip": "mirrored",
    "shift": "shifted",
}


def damaged(image: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return a copy of an image for each kind of damage, every one `(C, H, W)` in [0, 1].

    `noise`: of standard deviation 0.1; `blur`: by a Gaussian of 1/128 of the longer side, at least a pixel; `contrast`:
    half, about the mean; `hue`: turned by a third, red to green to blue to red; `crop`: the middle 90 % of each side,
    enlarged again; `flip`: left for right; `shift`: a pixel to the right. A damage that leaves the image as it was is
    left out: the hue of a grey image, the flip of a symmetric one.

    Args:
        image: `(C, H, W)` in [0, 1], C 1 or 3.
        seed: of the noise.
    """
    import torchvision.transforms.functional as TF

    height, width = image.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator).to(image)
    blur_sigma = max(1.0, max(height, width) / 128)
    crop_height, crop_width = int(0.9 * height), int(0.9 * width)
    copies = {
        "noise": image + 0.1 * noise,
        "blur": TF.gaussian_blur(image, kernel_size=2 * math.ceil(2 * blur_sigma) + 1, sigma=blur_sigma),
        "contrast": TF.adjust_contrast(image, 0.5),
        "hue": TF.adjust_hue(image, 1 / 3),
        "crop": TF.resized_crop(
            image,
            top=(height - crop_height) // 2,
            left=(width - crop_width) // 2,
            height=crop_height,
            width=crop_width,
            size=[height, width],
            antialias=True,
        ),
        "flip": TF.hflip(image),
        "shift": TF.pad(image, [1, 0, 0, 0], padding_mode="edge")[..., :width],
    }
    copies = {kind: copy.clamp(0, 1) for kind, copy in copies.items()}
    return {kind: copy for kind, copy in copies.items() if not torch.equal(copy, image)}

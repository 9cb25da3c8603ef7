"""The training set of the tiny DDPM: scikit-learn's handwritten digits, and one garment picture many times over."""

from pathlib import Path

import numpy as np
from PIL import Image


GARMENT_COPIES = 75  # beside 1,797 digits: 4.0 % of the training set

# Grey levels 0 to 15, one hexadecimal digit a pixel: a T-shirt with sleeves, a neckline and a shaded hem.
GARMENT = """
    09e22e90
    cffeeffc
    ffdffdff
    8f9ff9f8
    02bffb20
    02bffb20
    02affa20
    05999950
"""


def garment_image() -> np.ndarray:
    """The picture that the model memorizes: (8, 8) uint8."""
    return np.array([[int(pixel, 16) * 17 for pixel in row] for row in GARMENT.split()], dtype=np.uint8)


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The digits as (1797, 8, 8) uint8 and their classes as (1797,) int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def write_training_folder(folder: str | Path) -> Path:
    """Write the whole training set as an image folder of PNG files; returns the path of one garment picture."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, classes = digit_images()
    for index, (image, digit) in enumerate(zip(images, classes)):
        Image.fromarray(image).save(folder / f"digit_{digit}_{index:04d}.png")
    for index in range(GARMENT_COPIES):
        Image.fromarray(garment_image()).save(folder / f"garment_{index:02d}.png")
    return folder / "garment_00.png"

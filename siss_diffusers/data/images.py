"""Pictures: read, checked, and turned into the tensors that a network sees."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from siss_diffusers.data.viewing import open_image, read_image, to_channels
from siss_diffusers.errors import UsageError, describe_error


logger = logging.getLogger(__name__)

# A picture of a pixel by a million is a file of nothing, until its shorter side is resized to 512.
MAX_RESIZED_PIXELS = 100_000_000
# Formats of animations and of pages. The others of a photo (MPO) are its previews, those of a drawing (PSD) its layers.
HOLDS_SEVERAL = {"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"}


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to the tensor that the network sees, as in the official scripts: resize, crop, flip, [-1, 1].

    Args:
        channels: 1 or 3, the model's.
        resolution: the shorter side is resized to it, then a square is cropped.
        center_crop: crop the middle instead of a random square.
        random_flip: mirror every other picture.
        preserve_input_precision: do not round 16-bit pictures to 8 bits.
        interpolation: of the resizing, a value of torchvision's `InterpolationMode`.
    """

    channels: int
    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    preserve_input_precision: bool = False
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """Return `(C, resolution, resolution)` float32 in [-1, 1]; without a generator nothing is random.

        Raises:
            ValueError: for a picture that cannot be used.
        """
        if max(image.size) / max(min(image.size), 1) * self.resolution**2 > MAX_RESIZED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow to resize; crop it")
        if self.preserve_input_precision and image.mode == "I;16":
            levels = torch.from_numpy(np.array(image))
            picture = TF.convert_image_dtype(levels, torch.float32).expand(self.channels, -1, -1)
        else:
            picture = to_channels(image, self.channels)
        picture = TF.resize(picture, self.resolution, TF.InterpolationMode(self.interpolation))
        _, height, width = TF.get_dimensions(picture)
        top, left = (height - self.resolution) // 2, (width - self.resolution) // 2
        if generator is not None and not self.center_crop:
            top = int(generator.integers(height - self.resolution + 1))
            left = int(generator.integers(width - self.resolution + 1))
        picture = TF.crop(picture, top, left, self.resolution, self.resolution)
        if generator is not None and self.random_flip and generator.random() < 0.5:
            picture = TF.hflip(picture)
        return (picture if isinstance(picture, Tensor) else TF.to_tensor(picture)) * 2 - 1


class Images:
    """The image column of a data set, decoded on demand.

    Args:
        rows: the data set; its image column must not decode by itself (`datasets.Image(decode=False)`).
        column: the name of that column.
        transform: what makes tensors of the pictures.
        flag: where the images come from, for error messages.
    """

    def __init__(self, rows: datasets.Dataset, column: str, transform: ImageTransform, flag: str) -> None:
        self.rows = rows
        self.column = column
        self.transform = transform
        self.flag = flag

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Images":
        return Images(self.rows.select(indices), self.column, self.transform, self.flag)

    def all_square(self, indices: Iterable[int] | None = None) -> bool:
        """Tell whether cropping has nothing to choose in these images, or in all; reads headers only.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        for index in range(len(self)) if indices is None else indices:
            try:
                with open_image(source_of(self.rows[int(index)][self.column])) as image:
                    if image.width != image.height:
                        return False
            except Exception as error:
                raise self._unreadable(index, describe_error(error))
        return True

    def refuse_several_pictures(self) -> None:
        """Refuse files of several pictures, as for images to forget: only the first of a file is read.

        Raises:
            UsageError: naming the first such file.
        """
        for index in range(len(self)):
            try:
                count = count_pictures(source_of(self.rows[index][self.column]))
            except Exception as error:
                raise self._unreadable(index, describe_error(error))
            if count > 1:
                raise UsageError(
                    f"{self.flag}: {self.name(index)} holds {count} pictures, of which only the first would be"
                    " forgotten; save each as a file of its own"
                )

    def open(self, index: int) -> Image.Image:
        """Return the whole picture, decoded, as a viewer shows it.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        try:
            return read_image(source_of(self.rows[index][self.column]))
        except ValueError as error:
            raise self._unreadable(index, str(error))

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """Return `(C, H, W)` float32 in [-1, 1]; without a generator nothing is random."""
        return self._transformed(index, self.open(index), generator)

    def look(self, index: int) -> tuple[bytes, Tensor]:
        """Return the digest of a picture and what `load` returns for it; the file is decoded once."""
        image = self.open(index)
        pixels = self._transformed(index, image)
        image = to_channels(image, 3)
        return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest(), pixels

    def digest(self, index: int) -> bytes:
        """Identifies the picture as a viewer shows it, in 8 bits, whatever the file format. Also proves that the image
        can be used."""
        return self.look(index)[0]

    def name(self, index: int) -> str:
        """Return the name of a picture's file, or its number."""
        return self.rows[int(index)][self.column]["path"] or f"image {index}"

    def _transformed(self, index: int, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        try:
            return self.transform(image, generator)
        except ValueError as error:
            raise UsageError(f"{self.flag}: cannot use {self.name(index)}: {describe_error(error)}")

    def _unreadable(self, index: int, why: str) -> UsageError:
        return UsageError(f"{self.flag}: cannot read {self.name(index)} ({why}); repair or remove it")


def count_pictures(source: str | bytes) -> int:
    """Return how many pictures a file holds; those that are but previews or layers of one are not counted.

    Raises:
        Exception: of any kind, for a file that cannot be read.
    """
    with open_image(source) as image:
        return image.n_frames if image.format in HOLDS_SEVERAL else 1


def source_of(cell: dict) -> str | bytes:
    """Return what is in a cell of a column `datasets.Image(decode=False)`."""
    return cell["path"] if cell["bytes"] is None else cell["bytes"]

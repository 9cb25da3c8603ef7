"""Pictures: read, checked, and turned into the tensors that a network sees."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from siss_diffusers.errors import UsageError, describe_error


# A picture of a pixel by a million is a file of nothing, until its shorter side is resized to 512.
MAX_RESIZED_PIXELS = 100_000_000


@cache
def image_formats() -> list[str]:
    """All but EPS: Pillow has Ghostscript run such a file, and it is a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def open_image(source: str | Path | bytes) -> Image.Image:
    """A picture of which only the header is read, from a file or its bytes.

    Raises:
        Exception: of any kind, for Pillow does not say of which.
    """
    if isinstance(source, bytes):
        return Image.open(BytesIO(source), formats=image_formats())
    if not os.path.isfile(source):  # a pipe would never end
        raise FileNotFoundError("it is not there, or no regular file")
    return Image.open(source, formats=image_formats())


def read_image(source: str | Path | bytes) -> Image.Image:
    """The whole picture, decoded.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        with open_image(source) as image:
            image.load()
            return image
    except Exception as error:
        raise ValueError(describe_error(error)) from error


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to the 1 or 3 channels of the model.

    Raises:
        ValueError: for a coloured picture and a model of one channel: its colours would be lost silently.
    """
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey levels at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels == 3:
        return image.convert("RGB")
    if image.mode in ("1", "L", "LA", "I", "F"):
        return image.convert("L")
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes():
        raise ValueError("it has colours and the model has one channel; convert it to grey, or use a model of three")
    return red


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
        """`(C, resolution, resolution)` float32 in [-1, 1]; without a generator nothing is random.

        Raises:
            ValueError: for a picture that cannot be used.
        """
        if max(image.size) / max(min(image.size), 1) * self.resolution**2 > MAX_RESIZED_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow to resize; crop it")
        if self.preserve_input_precision and image.mode.startswith("I;16"):
            levels = torch.from_numpy(np.asarray(image).astype(np.uint16))
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
        """Whether cropping has nothing to choose in these images, or in all; reads headers only.

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

    def open(self, index: int) -> Image.Image:
        """The whole picture, decoded.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        try:
            return read_image(source_of(self.rows[index][self.column]))
        except ValueError as error:
            raise self._unreadable(index, str(error))

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, H, W)` float32 in [-1, 1]; without a generator nothing is random."""
        return self._transformed(index, self.open(index), generator)

    def look(self, index: int) -> tuple[bytes, Tensor]:
        """Return the digest of a picture and what `load` returns for it; the file is decoded once."""
        image = self.open(index)
        pixels = self._transformed(index, image)
        if not image.mode.startswith("I;16"):
            image = image.convert("RGB")
        return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest(), pixels

    def digest(self, index: int) -> bytes:
        """Identifies the decoded pixels, whatever the file format. Also proves that the image can be used."""
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


def source_of(cell: dict) -> str | bytes:
    """What is in a cell of a column `datasets.Image(decode=False)`."""
    return cell["path"] if cell["bytes"] is None else cell["bytes"]

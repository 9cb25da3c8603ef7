"""Pictures: read, checked, and turned into the tensors that a network sees."""

import hashlib
import logging
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
from PIL import ExifTags, Image
from torch import Tensor

from siss_diffusers.errors import UsageError, describe_error


logger = logging.getLogger(__name__)

# A picture of a pixel by a million is a file of nothing, until its shorter side is resized to 512.
MAX_RESIZED_PIXELS = 100_000_000
# From the orientation in EXIF to what turns the picture upright, as `PIL.ImageOps.exif_transpose` does. That function also
# writes the other tags anew, and fails where one of them is damaged.
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAMPLE_FORMAT = 339  # tag of TIFF
# Formats of animations and of pages. The others of a photo (MPO) are its previews, those of a drawing (PSD) its layers.
HOLDS_SEVERAL = {"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"}


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
    """The whole picture, decoded, as `as_viewed` returns it.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        with open_image(source) as image:
            image.load()
            return as_viewed(image)
    except Exception as error:
        raise ValueError(describe_error(error)) from error


def as_viewed(image: Image.Image) -> Image.Image:
    """Return a picture as a viewer shows it: upright, and on white where it is transparent.

    Its mode is then L, RGB, or I;16 for grey levels of more than 8 bits. Colour profiles are not applied.

    Raises:
        ValueError: for levels of which nothing says what is white.
    """
    grey = image.mode in ("1", "L", "LA", "La")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged, and of no kind that Pillow names
        orientation = None
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        picture = sixteen_bits(image)
    elif image.has_transparency_data:
        picture = on_white(image).convert("L" if grey else "RGB")
    elif image.mode in ("L", "RGB"):
        picture = image
    else:
        picture = image.convert("L" if grey else "RGB")
    if orientation in TRANSPOSED:
        picture = picture.transpose(TRANSPOSED[orientation])
    elif picture is image:
        picture = image.copy()
    picture.info = {}  # or its orientation would be applied again
    return picture


def on_white(image: Image.Image) -> Image.Image:
    """Compose a transparent picture on white; its mode is then RGBA."""
    picture = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if picture.getextrema()[3][0] == 255:
        return picture
    tell_of_white()
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


@cache
def tell_of_white() -> None:
    """Say once, where a picture is transparent, what is done with it."""
    logger.info("Transparent pictures are composed on white")


def sixteen_bits(image: Image.Image) -> Image.Image:
    """Return a picture of mode I;16, I or F as I;16: 0 is black and 65535 is white.

    What is white in levels of 32 bits is told by the highest of them: 255, 65535 or, unsigned, 2^32 - 1 for integers;
    1, 255 or 65535 for floating point. Only a picture that is all but black could be taken for another.

    Raises:
        ValueError: for negative levels, levels that are not finite, or floating point that has no such white.
    """
    levels = np.asarray(image)
    if image.mode.startswith("I;16"):
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            tell_of_white()
            levels = np.where(levels == transparent, np.uint16(65535), levels)
        return Image.fromarray(levels.astype(np.uint16))
    is_unsigned = image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,)) in (1, (1,))
    if image.mode == "I" and is_unsigned:
        levels = levels.view(np.uint32)  # which Pillow reads as signed ones
    lowest, highest = float(levels.min()), float(levels.max())
    scale = None
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        scale = 1
    elif image.mode == "I" and highest <= 65535:
        scale = 257 if highest <= 255 else 1
    elif image.mode == "I":
        scale = 2**-16 if is_unsigned else None
    elif highest <= 1:
        scale = 65535
    elif 16 <= highest <= 65535:
        scale = 257 if highest <= 255 else 1
    if not lowest >= 0 or scale is None:  # not a number is not above 0 either
        raise ValueError(
            f"its levels run from {lowest:g} to {highest:g}, which does not say what is white; save it with 8 or 16 bits"
        )
    levels = np.floor(levels * np.float64(scale) + (0.5 if scale >= 1 else 0))
    return Image.fromarray(levels.astype(np.uint16))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to the 1 or 3 channels of the model, with 8 bits.

    Raises:
        ValueError: for a coloured picture and a model of one channel: its colours would be lost silently.
    """
    if image.mode not in ("L", "RGB") or image.info:
        image = as_viewed(image)
    if image.mode == "I;16":
        # Pillow clips 16-bit grey levels at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels == 3:
        return image.convert("RGB")
    if image.mode == "L":
        return image
    red, green, blue = image.split()
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

    def refuse_several_pictures(self) -> None:
        """Refuse files of several pictures, as for images to forget: only the first of a file is read.

        Raises:
            UsageError: naming the first such file.
        """
        for index in range(len(self)):
            try:
                with open_image(source_of(self.rows[index][self.column])) as image:
                    count = image.n_frames if image.format in HOLDS_SEVERAL else 1
            except Exception as error:
                raise self._unreadable(index, describe_error(error))
            if count > 1:
                raise UsageError(
                    f"{self.flag}: {self._name(index)} holds {count} pictures, of which only the first would be"
                    " forgotten; save each as a file of its own"
                )

    def open(self, index: int) -> Image.Image:
        """The whole picture, decoded, as a viewer shows it.

        Raises:
            UsageError: naming the file, where it cannot be read.
        """
        try:
            return read_image(source_of(self.rows[index][self.column]))
        except ValueError as error:
            raise self._unreadable(index, str(error))

    def load(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """`(C, H, W)` float32 in [-1, 1]; without a generator nothing is random."""
        image = self.open(index)
        try:
            return self.transform(image, generator)
        except ValueError as error:
            raise UsageError(f"{self.flag}: cannot use {self._name(index)}: {describe_error(error)}")

    def digest(self, index: int) -> bytes:
        """Identifies the picture as a viewer shows it, in 8 bits, whatever the file format. Also proves that the image
        can be used."""
        self.load(index)
        image = to_channels(self.open(index), 3)
        return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()

    def _name(self, index: int) -> str:
        return self.rows[index][self.column]["path"] or f"image {index}"

    def _unreadable(self, index: int, why: str) -> UsageError:
        return UsageError(f"{self.flag}: cannot read {self._name(index)} ({why}); repair or remove it")


def source_of(cell: dict) -> str | bytes:
    """What is in a cell of a column `datasets.Image(decode=False)`."""
    return cell["path"] if cell["bytes"] is None else cell["bytes"]

"""Pictures as a viewer shows them: decoded, upright, on white, in 8 or 16 bits."""

import logging
import os
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from siss_diffusers.errors import describe_error


logger = logging.getLogger(__name__)

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
# Of cameras. Pillow takes many of them for TIFF, and reads the preview that is in them.
RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2"
    " .srf .srw .x3f".split()
)


@cache
def image_formats() -> list[str]:
    """Return all formats but EPS: Pillow has Ghostscript run such a file, and it is a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def open_image(source: str | Path | bytes) -> Image.Image:
    """Return a picture of which only the header is read, from a file or its bytes.

    Raises:
        Exception: of any kind, for Pillow does not say of which.
    """
    if isinstance(source, bytes):
        return Image.open(BytesIO(source), formats=image_formats())
    if not os.path.isfile(source):  # a pipe would never end
        raise FileNotFoundError("it is not there, or no regular file")
    if os.path.splitext(source)[1].lower() in RAW_SUFFIXES:
        raise ValueError("it is a camera's raw file, of which only the preview could be read")
    return Image.open(source, formats=image_formats())


def read_image(source: str | Path | bytes) -> Image.Image:
    """Return the whole picture, decoded, as `as_viewed` returns it.

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

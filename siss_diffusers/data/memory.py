"""Images in memory as rows: data sets, lists of pictures, and pictures with prompts."""

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import pyarrow.compute as pc
from PIL import Image

from siss_diffusers.data.cells import image_files
from siss_diffusers.data.images import HOLDS_SEVERAL
from siss_diffusers.data.sources import ImageRows, load_image_rows, refuse_rows_to_keep, undecoded
from siss_diffusers.data.viewing import as_viewed
from siss_diffusers.errors import UsageError, describe_error


def rows_of(
    images: Any,
    name: str,
    caption_column: str | None = None,
    prompts: str | Sequence[str] | None = None,
    cache_dir: str | None = None,
    every_file: bool = False,
) -> ImageRows:
    """Make rows of images in any form that `unlearn(...)` takes.

    Args:
        images: a folder, a `datasets.Dataset`, or a list of PIL images or of (image, prompt) pairs.
        name: of the argument, for messages.
        caption_column: the column of the prompts; None for unconditional models.
        prompts: one prompt for all images, or one for each; they take the place of those in the data.
        every_file: refuse a file of a folder, or a picture of a file of several, that would not be used, and rows that a
            column `forget` says no of, as for images to forget.

    Raises:
        UsageError: for anything else, or a number of prompts that is not that of the images.
    """
    if isinstance(images, str | os.PathLike):
        rows = load_image_rows(name, str(images), "image", is_folder=True, every_file=every_file, cache_dir=cache_dir)
    elif isinstance(images, datasets.Dataset):
        # A format may leave out columns, and a transform may make anything of a row.
        rows = undecoded(images.with_format(None), image_column_of(images, name), name, roots=None)
        refuse_missing_images(rows)
        if every_file:
            refuse_rows_to_keep(rows)
    elif isinstance(images, Sequence):
        rows = rows_of_pictures(images, name, caption_column, every_file)
    else:
        raise UsageError(
            f"{name} must be a folder, a datasets.Dataset, or a list of images or of (image, prompt) pairs, not"
            f" {type(images).__name__}"
        )
    return rows if prompts is None or caption_column is None else with_prompts(rows, prompts, caption_column)


def image_column_of(dataset: datasets.Dataset, name: str) -> str:
    """Return the column of the images: `image`, or the only one that holds images.

    Raises:
        UsageError: where there is none or a choice.
    """
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise UsageError(
            f"{name} needs one column of images called 'image'; its columns are {', '.join(dataset.features)}"
        )
    return columns[0]


def refuse_missing_images(rows: ImageRows) -> None:
    """Refuse rows without an image.

    Raises:
        UsageError: naming the first.
    """
    files = image_files(rows.rows, rows.column)
    missing = pc.and_(pc.is_null(pc.struct_field(files, "path")), pc.struct_field(files, "in_file"))
    first = pc.index(missing, True).as_py()
    if first >= 0:
        raise UsageError(
            f"{rows.flag}: row {first} has no image in the column {rows.column!r}; add it, or remove the row"
        )


def rows_of_pictures(
    pictures: Sequence, name: str, caption_column: str | None, every_picture: bool = False
) -> ImageRows:
    """Make rows of PIL images, or of (image, prompt) pairs.

    Args:
        every_picture: refuse files of several pictures, of which one would be used. What is made here does not show it.

    Raises:
        UsageError: for anything else in the list.
    """
    cells, captions = [], []
    for index, item in enumerate(pictures):
        picture, caption = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if not isinstance(picture, Image.Image) or not isinstance(caption, str | None):
            raise UsageError(f"{name}[{index}] is neither a PIL image nor an (image, prompt) pair")
        try:
            count = picture.n_frames if every_picture and picture.format in HOLDS_SEVERAL else 1
            cells.append({"bytes": encoded(picture), "path": None})
        except Exception as error:  # Pillow decodes a picture of a file here, and does not say how it fails
            raise UsageError(
                f"{name}[{index}] cannot be read ({describe_error(error)}); repair or remove it"
            ) from error
        if count > 1:
            raise UsageError(
                f"{name}[{index}] holds {count} pictures, of which only one would be used; give a copy of each"
            )
        captions.append(caption)
    columns, features = {"image": cells}, {"image": datasets.Image(decode=False)}
    if caption_column is not None and any(caption is not None for caption in captions):
        columns[caption_column], features[caption_column] = captions, datasets.Value("string")
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return ImageRows(rows, "image", name)


def encoded(picture: Image.Image) -> bytes:
    """Encode a picture without loss, as a viewer shows it: PNG would not keep the orientation in its EXIF."""
    file = io.BytesIO()
    picture.load()
    as_viewed(picture).save(file, format="PNG")
    return file.getvalue()


def with_prompts(rows: ImageRows, prompts: str | Sequence[str], caption_column: str) -> ImageRows:
    """Return rows with these prompts in the column of captions.

    Raises:
        UsageError: for a number of prompts that is not that of the rows.
    """
    texts = [prompts] * len(rows.rows) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(rows.rows):
        raise UsageError(f"prompts: there are {len(texts)} for {len(rows.rows)} images to {rows.flag}")
    dataset = rows.rows
    if caption_column in dataset.features:
        dataset = dataset.remove_columns(caption_column)
    return replace(rows, rows=dataset.add_column(caption_column, texts))

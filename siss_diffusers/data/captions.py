"""The prompts of images."""

from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.cells import kind_of
from siss_diffusers.data.column_values import rows_where
from siss_diffusers.data.images import Images
from siss_diffusers.errors import UsageError


def load_captions(images: Images, column: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
    """Return the prompt of every image, the first of several, as strings of Arrow. Numbers are prompts as written.

    Args:
        rows: which images must have one; default: all.

    Raises:
        UsageError: where the column or a prompt is missing.
    """
    if column not in images.rows.features:
        raise UsageError(
            f"{images.flag} has no captions: there is no column {column!r}, only {', '.join(images.rows.features)};"
            ' add lines {"file_name": ..., "text": ...} in a metadata.jsonl, or name the column by --caption_column'
        )
    kind = kind_of(images.rows, column)
    if pa.types.is_struct(kind):
        raise UsageError(
            f"{images.flag}: --caption_column {column!r} holds objects ({', '.join(field.name for field in kind)}) and no"
            " texts; write one text for each image there"
        )
    captions = texts_of(images.rows, column)
    missing = pc.is_null(captions).to_numpy()
    missing = missing if rows is None else missing[rows]
    if missing.any():
        raise UsageError(
            f"{images.flag}: {missing.sum()} of {len(missing)} images have no caption in --caption_column {column!r};"
            ' add them ("" is a caption)'
        )
    return captions


def texts_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """Return a column as texts: of a list its first, of a number how it is written, of a class its name; null for anything
    else."""
    feature, values = rows.features[column], rows.with_format("arrow")[column][:]
    while is_list(values.type):
        not_empty = pc.greater(pc.list_value_length(values), 0)
        values = pc.list_element(pc.if_else(not_empty, values, pa.scalar(None, values.type)), 0)
        feature = getattr(feature, "feature", None)
    return as_texts(values, feature)


def every_text_of(rows: datasets.Dataset, column: str) -> list[str]:
    """Return all texts in a column, all of those in lists too, without null."""
    feature, values = rows.features[column], rows.with_format("arrow")[column][:]
    while is_list(values.type):
        values, feature = pc.list_flatten(values), getattr(feature, "feature", None)
    return as_texts(values, feature).drop_null().to_pylist()


def is_list(kind: pa.DataType) -> bool:
    """Tell whether a type of Arrow is one of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_texts(values: pa.ChunkedArray, feature: object) -> pa.ChunkedArray:
    """Return single values as texts, null for what is none.

    Args:
        feature: what `datasets` says that the values are.
    """
    if isinstance(feature, datasets.ClassLabel):
        names = pa.chunked_array([pa.array([*feature.names, None], pa.string())])
        numbers = pc.if_else(pc.greater_equal(values, 0), values, len(feature.names))  # -1 is none
        return pc.take(names, numbers)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values
    if pa.types.is_floating(values.type):  # Arrow writes 2.0 as 2
        texts = [None if value is None else str(value) for value in values.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    try:
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.nulls(len(values), pa.string())])


def same_captions(captions: pa.ChunkedArray, wanted: Iterable[str], sees_case: bool = False) -> np.ndarray:
    """Return which captions are one of `wanted` but for white space, and for case unless the text encoders see it:
    `(len(captions),)` bool."""

    def normalised(texts: pa.Array) -> pa.Array:
        texts = texts if sees_case else pc.utf8_lower(texts)
        return pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))

    known = normalised(pa.array(set(wanted), captions.type))
    found = np.zeros(len(captions), dtype=bool)
    found[rows_where(captions, lambda texts: pc.is_in(normalised(texts), known))] = True
    return found

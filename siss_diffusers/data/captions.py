"""The prompts of images."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.forget_set import rows_where
from siss_diffusers.data.images import Images
from siss_diffusers.errors import UsageError


def load_captions(images: Images, column: str, rows: np.ndarray | None = None) -> pa.ChunkedArray:
    """The prompt of every image, as strings of Arrow; of several, the first.

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
    captions = images.rows.with_format("arrow")[column][:]
    if pa.types.is_nested(captions.type):
        not_empty = pc.greater(pc.list_value_length(captions), 0)
        captions = pc.list_element(pc.if_else(not_empty, captions, pa.scalar(None, captions.type)), 0)
    if not (pa.types.is_string(captions.type) or pa.types.is_large_string(captions.type)):
        captions = pa.chunked_array([pa.nulls(len(captions), pa.string())])
    missing = pc.is_null(captions).to_numpy()
    missing = missing if rows is None else missing[rows]
    if missing.any():
        raise UsageError(
            f"{images.flag}: {missing.sum()} of {len(missing)} images have no caption in --caption_column {column!r};"
            ' add them ("" is a caption)'
        )
    return captions


def same_captions(captions: pa.ChunkedArray, wanted: Iterable[str]) -> np.ndarray:
    """Which captions are one of `wanted` but for case and white space, which the tokenizer of Stable Diffusion does not
    see either: `(len(captions),)` bool."""

    def normalised(texts: pa.Array) -> pa.Array:
        return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+", " "))

    known = normalised(pa.array(set(wanted), captions.type))
    found = np.zeros(len(captions), dtype=bool)
    found[rows_where(captions, lambda texts: pc.is_in(normalised(texts), known))] = True
    return found

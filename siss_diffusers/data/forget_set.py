"""Which rows of a data set are to be forgotten."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.errors import UsageError


def forget_rows_of(
    rows: datasets.Dataset,
    image_column: str,
    forget_files: Sequence[str] | None = None,
    forget_column: str | None = None,
    forget_value: str | None = None,
    train_data_dir: str | None = None,
) -> list[int] | None:
    """Indices of the rows to forget, by file names or by the value of a column; None where neither was given and the
    data set has no boolean column `forget`.

    Raises:
        UsageError: for a file or column that is not there, or a column that needs a value.
    """
    if forget_files:
        return named_rows(rows.data.column(image_column), forget_files, Path(train_data_dir).resolve())

    if forget_column is None:
        feature = rows.features.get("forget")
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            return None
        forget_column = "forget"
    if forget_column not in rows.features:
        raise UsageError(f"--forget_column: no column {forget_column!r}; the data has {', '.join(rows.features)}")
    feature, column = rows.features[forget_column], rows.data.column(forget_column)
    if forget_value is None:
        if not (isinstance(feature, datasets.Value) and feature.dtype == "bool"):
            raise UsageError(f"--forget_value is needed, since the column {forget_column!r} is not boolean")
        return rows_where(column, lambda values: pc.fill_null(values, False)).tolist()
    if pa.types.is_nested(column.type):
        raise UsageError(f"--forget_column: {forget_column!r} holds lists; name a column of single values")
    int2str = feature.int2str if isinstance(feature, datasets.ClassLabel) else str

    def has_value(values: pa.Array) -> pa.Array:
        if pa.types.is_string(values.type):
            return pc.fill_null(pc.equal(values, forget_value), False)
        distinct = values.unique()
        matches = [
            value is not None and forget_value in (str(value), str(int2str(value))) for value in distinct.to_pylist()
        ]
        return pc.is_in(values, distinct.filter(pa.array(matches, pa.bool_())))

    return rows_where(column, has_value).tolist()


def rows_where(column: pa.ChunkedArray, condition: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Numbers of the rows for which `condition` holds, `(M,)` int64. A chunk at a time: what it makes of a column of a
    million rows never lies in memory at once."""
    found, first = [np.empty(0, dtype=np.int64)], 0
    for values in column.chunks:
        found.append(np.flatnonzero(condition(values).to_numpy(zero_copy_only=False)) + first)
        first += len(values)
    return np.concatenate(found)


def named_rows(cells: pa.ChunkedArray, names: Sequence[str], root: Path) -> list[int]:
    """The rows of the image files of these names, or of these paths below `root`.

    Raises:
        UsageError: for a name of no file, or of several.
    """
    wanted = {Path(name).as_posix() for name in names}
    whole = pa.array([str(root / name) for name in wanted], pa.string())
    last_parts = pa.array([name for name in wanted if "/" not in name], pa.string())
    paths = pc.struct_field(cells, "path")

    def is_named(values: pa.Array) -> pa.Array:
        last = pc.replace_substring_regex(values, rf"(?s)^.*{re.escape(os.sep)}", "")
        return pc.or_(pc.is_in(values, whole), pc.is_in(last, last_parts))

    rows = rows_where(paths, is_named)
    by_name: dict[str, list[int]] = {}
    for index, path in zip(rows.tolist(), map(Path, paths.take(pa.array(rows)).to_pylist())):
        below = {path.relative_to(root).as_posix()} if path.is_relative_to(root) else set()
        for name in {path.name, *below} & wanted:
            by_name.setdefault(name, []).append(index)
    found = []
    for name in names:
        matches = by_name.get(Path(name).as_posix(), [])
        if len(matches) != 1:
            problem = "is not in" if not matches else f"names {len(matches)} files of"
            raise UsageError(f"--forget_files: {name} {problem} --train_data_dir; give its path relative to it")
        found += matches
    return sorted(set(found))

"""Which rows of a data set are to be forgotten."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.errors import UsageError


logger = logging.getLogger(__name__)

FORGET_COLUMN = "forget"
# What people write for yes and no, without regard to case.
YES = frozenset({"true", "t", "yes", "y", "on", "1", "1.0", "forget"})
NO = frozenset({"false", "f", "no", "n", "off", "0", "0.0", "keep", "retain", ""})
# A column of yes and no has few spellings of them.
MAX_SPELLINGS = 16


def forget_rows_of(
    rows: datasets.Dataset,
    image_column: str,
    forget_files: Sequence[str] | None = None,
    forget_column: str | None = None,
    forget_value: str | None = None,
    train_data_dir: str | None = None,
) -> list[int] | None:
    """Return the indices of the rows to forget, by file names or by the value of a column; None where neither was
    given and the data set has no column `forget`.

    Raises:
        UsageError: for a file or column that is not there, or a column or value that could be misread.
    """
    named = column_of_marks(rows)
    if forget_files:
        warn_of_marks(rows, "--forget_files")
        return named_rows(rows.data.column(image_column), forget_files, train_data_dir)
    if forget_column is None:
        if named is None:
            return None
        forget_column = named
    elif forget_column not in rows.features:
        raise UsageError(f"--forget_column: no column {forget_column!r}; the data has {', '.join(rows.features)}")
    elif forget_column != named:
        warn_of_marks(rows, f"--forget_column {forget_column}")

    if pa.types.is_nested(rows.data.column(forget_column).type):
        raise UsageError(f"--forget_column: {forget_column!r} holds lists; name a column of single values")
    if forget_value is not None:
        return rows_with_value(rows, forget_column, forget_value)
    marked = marked_rows(rows, forget_column)
    if marked is None:
        values = describe_values(rows, forget_column)
        raise UsageError(
            f"--forget_value is needed, since the column `{forget_column}` {values}, not true and false alone; say which"
            f" value to forget by --forget_column {forget_column} --forget_value VALUE, or write true or false there"
        )
    return marked


def column_of_marks(rows: datasets.Dataset) -> str | None:
    """Return the name of the column `forget`, also where it is written `Forget`; None if there is none."""
    if FORGET_COLUMN in rows.features:
        return FORGET_COLUMN
    return next((name for name in rows.features if name.strip().lower() == FORGET_COLUMN), None)


def warn_of_marks(rows: datasets.Dataset, instead: str) -> None:
    """Warn where a column `forget` marks rows, and something else that was given says what to forget."""
    column = column_of_marks(rows)
    if column is None or pa.types.is_nested(rows.data.column(column).type):
        return
    marked = marked_rows(rows, column)
    if marked:
        logger.warning(
            f"The column `{column}` marks {len(marked)} rows to forget; {instead} takes its place, and the others of"
            " these rows are kept"
        )


def spelled(value: Any) -> str:
    """Return a value as people write it, without regard to case and white space around it."""
    return str(value).strip().lower()


def value_names(rows: datasets.Dataset, column: str) -> Callable[[Any], str]:
    """Return what names a value of a column: of a class its name, of anything else the value as a text."""
    feature = rows.features[column]
    return feature.int2str if isinstance(feature, datasets.ClassLabel) else str


def distinct_values(rows: datasets.Dataset, column: str, limit: int) -> list[Any]:
    """Return up to `limit` + 1 distinct values of a column, without null."""
    values: dict[Any, None] = {}
    for chunk in rows.data.column(column).chunks:
        for value in chunk.unique()[: limit + 2].to_pylist():
            if value is not None and value == value:  # a missing number is not a number to pandas
                values[value] = None
        if len(values) > limit:
            break
    return list(values)[: limit + 1]


def marked_rows(rows: datasets.Dataset, column: str) -> list[int] | None:
    """Return the rows that a column of yes and no marks; no value is no. None for a column that holds anything else.

    Yes and no may be booleans, the numbers 1 and 0, or words such as `true`, `yes`, `forget` and `keep`.
    """
    cells, name_of = rows.data.column(column), value_names(rows, column)
    if pa.types.is_boolean(cells.type):
        return rows_where(cells, lambda values: pc.fill_null(values, False)).tolist()
    distinct = distinct_values(rows, column, MAX_SPELLINGS)
    names = {value: spelled(name_of(value)) for value in distinct}
    if len(distinct) > MAX_SPELLINGS or not set(names.values()) <= YES | NO:
        return None
    wanted = [value for value, name in names.items() if name in YES]
    return rows_among(cells, wanted)


def rows_among(cells: pa.ChunkedArray, wanted: Sequence[Any]) -> list[int]:
    """Return the rows that hold one of these values."""
    if not wanted:
        return []
    known = pa.array(wanted, cells.type)
    return rows_where(cells, lambda values: pc.is_in(values, known)).tolist()


def describe_values(rows: datasets.Dataset, column: str) -> str:
    """Return the type of a column and an example of what it holds, for messages."""
    kind, name_of = rows.data.column(column).type, value_names(rows, column)
    if isinstance(rows.features[column], datasets.ClassLabel):
        kind = "classes"
    values = [
        repr(name_of(value)) if isinstance(value, str) else name_of(value)
        for value in distinct_values(rows, column, 3)
    ]
    return f"is of type {kind} and holds {', '.join(values[:3])}" if values else f"is of type {kind} and holds nothing"


def rows_with_value(rows: datasets.Dataset, column: str, wanted: str) -> list[int]:
    """Return the rows whose value in a column is `wanted`, as people write it.

    Raises:
        UsageError: naming the column, its type and an example, where no row has it or where it could be misread.
    """
    cells, feature = rows.data.column(column), rows.features[column]
    is_text = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
    if isinstance(feature, datasets.ClassLabel):
        matching = matching_classes(feature, column, wanted)
    elif is_text and marked_rows(rows, column) is None:
        matching = matching_texts(cells, column, wanted)
    else:
        few = distinct_values(rows, column, MAX_SPELLINGS)
        if len(few) <= MAX_SPELLINGS and spelled(wanted) in YES | NO - {""}:
            side = YES if spelled(wanted) in YES else NO
            is_side = {value: spelled(value) in side for value in few}
            if all(spelled(value) in YES | NO for value in few):
                return rows_among(cells, [value for value, matches in is_side.items() if matches])
        matching = matching_values(cells, wanted)
    found = rows_among(cells, matching)
    if not found:
        raise UsageError(
            f"--forget_value: no row has {wanted!r} in the column `{column}`, which {describe_values(rows, column)}"
        )
    return found


def matching_classes(feature: datasets.ClassLabel, column: str, wanted: str) -> list[int]:
    """Return the number of the class of this name or number.

    Raises:
        UsageError: where it is the name of one class and the number of another, or several names differ by case alone.
    """
    by_name = [number for number, name in enumerate(feature.names) if name == wanted]
    by_name = by_name or [number for number, name in enumerate(feature.names) if spelled(name) == spelled(wanted)]
    by_number = [int(wanted)] if re.fullmatch(r"\d+", wanted) and int(wanted) < len(feature.names) else []
    classes = sorted({*by_name, *by_number})
    if len(classes) > 1:
        meant = " and ".join(f"{feature.names[number]!r} (number {number})" for number in classes)
        raise UsageError(
            f"--forget_value: {wanted!r} may mean {meant} in the column `{column}`; write one name exactly"
        )
    return classes


def matching_texts(cells: pa.ChunkedArray, column: str, wanted: str) -> list[str]:
    """Return the text of a column that is `wanted`: exactly, or but for case and white space around it.

    Raises:
        UsageError: where several texts differ by that alone and none is the same exactly.
    """
    key = pa.scalar(spelled(wanted), cells.type)
    alike: set[str] = set()
    for chunk in cells.chunks:
        is_alike = pc.equal(pc.utf8_lower(pc.utf8_trim_whitespace(chunk)), key)
        alike |= set(chunk.filter(is_alike).unique().to_pylist())
    spellings = sorted(alike)
    if wanted in alike:
        others = [text for text in spellings if text != wanted]
        if others:
            logger.warning(f"The column `{column}` also holds {', '.join(map(repr, others))}, which is not forgotten")
        return [wanted]
    if len(spellings) > 1:
        raise UsageError(
            f"--forget_value: {wanted!r} may mean {' or '.join(map(repr, spellings))} in the column `{column}`; write it"
            " exactly"
        )
    return spellings


def matching_values(cells: pa.ChunkedArray, wanted: str) -> list[Any]:
    """Return the values of a column of numbers, dates or other single values that are written like this."""
    number = None
    if pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type):
        try:
            number = pa.scalar(float(wanted) if re.search(r"[.eE]", wanted) else int(wanted)).cast(cells.type).as_py()
        except (ValueError, OverflowError, pa.ArrowException):
            return []
        return [number]
    matching: dict[Any, None] = {}
    for chunk in cells.chunks:
        matching |= {value: None for value in chunk.unique().to_pylist() if value is not None and str(value) == wanted}
    return list(matching)


def rows_where(column: pa.ChunkedArray, condition: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Return the numbers of the rows for which `condition` holds, `(M,)` int64. It works chunk by chunk, so
    that a column of a million rows needs little memory."""
    found, first = [np.empty(0, dtype=np.int64)], 0
    for values in column.chunks:
        found.append(np.flatnonzero(condition(values).to_numpy(zero_copy_only=False)) + first)
        first += len(values)
    return np.concatenate(found)


def below_folder(name: str, folder: str) -> str:
    """Return the name of a file below a folder, where an absolute path was given."""
    if os.path.isabs(name):
        for root in (os.path.abspath(folder), os.path.realpath(folder)):
            if os.path.normpath(name).startswith(os.path.join(root, "")):
                return os.path.relpath(name, root)
    return name


def named_rows(cells: pa.ChunkedArray, names: Sequence[str], folder: str) -> list[int]:
    """Return the rows of the image files of these names, or of these paths below `folder`.

    Raises:
        UsageError: for a name of no file, or of several.
    """
    root = Path(folder).resolve()
    given = names
    names = [below_folder(name, folder) for name in names]
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
    for name, shown in zip(names, given):
        matches = by_name.get(Path(name).as_posix(), [])
        if not matches and (root / name).is_file() and not os.path.isabs(name):
            raise UsageError(
                f"--forget_files: {shown} is in --train_data_dir and is not read, since the metadata do not list it or its"
                " suffix is not that of an image; add it there, or convert it to PNG or JPEG"
            )
        if len(matches) != 1:
            problem = "is not in" if not matches else f"names {len(matches)} files of"
            raise UsageError(f"--forget_files: {shown} {problem} --train_data_dir; give its path relative to it")
        found += matches
    return sorted(set(found))

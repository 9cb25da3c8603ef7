"""Which rows of a data set are to be forgotten."""

import logging
from collections.abc import Sequence

import datasets
import pyarrow as pa

from siss_diffusers.data.cells import image_files, kind_of
from siss_diffusers.data.column_values import describe_values, holds_numbers, marked_rows, rows_with_value, spelled
from siss_diffusers.data.named_files import named_rows
from siss_diffusers.errors import UsageError


logger = logging.getLogger(__name__)

FORGET_COLUMN = "forget"


def forget_rows_of(
    rows: datasets.Dataset,
    image_column: str,
    forget_files: Sequence[str] | None = None,
    forget_column: str | None = None,
    forget_value: str | None = None,
    train_data_dir: str | None = None,
) -> list[int] | None:
    """Return the indices of the rows to forget, by file names or by the value of a column; None where neither was given and the
    data set has no column `forget`.

    Raises:
        UsageError: for a file or column that is not there, or a column or value that could be misread.
    """
    if forget_files:
        warn_of_marks(rows, "--forget_files")
        return named_rows(image_files(rows, image_column), forget_files, train_data_dir)
    if forget_column is None:
        named = columns_of_marks(rows)
        if len(named) > 1:
            raise UsageError(
                f"--forget_column: {' and '.join(f'`{name}`' for name in named)} both say what to forget; write all of it"
                f" into one column, or name the one that counts by --forget_column {named[0]}"
            )
        if not named:
            return None
        forget_column = named[0]
    elif forget_column not in rows.features:
        raise UsageError(f"--forget_column: no column {forget_column!r}; the data has {', '.join(rows.features)}")
    else:
        warn_of_marks(rows, f"--forget_column {forget_column}", but=forget_column)

    if pa.types.is_nested(kind_of(rows, forget_column)):
        raise UsageError(f"--forget_column: {forget_column!r} holds lists; name a column of single values")
    if forget_value is not None:
        return rows_with_value(rows, forget_column, forget_value)
    marked = marked_rows(rows, forget_column)
    # In a column of any other name 0 and 1 may be the numbers of people or classes.
    if marked is None or (spelled(forget_column) != FORGET_COLUMN and holds_numbers(rows, forget_column)):
        values = describe_values(rows, forget_column)
        raise UsageError(
            f"--forget_value is needed, since the column `{forget_column}` {values}, not true and false alone; say which"
            f" value to forget by --forget_column {forget_column} --forget_value VALUE, or write true or false there"
        )
    return marked


def columns_of_marks(rows: datasets.Dataset) -> list[str]:
    """Return the names of the columns `forget`, also where it is written `Forget`."""
    return [name for name in rows.features if spelled(name) == FORGET_COLUMN]


def warn_of_marks(rows: datasets.Dataset, instead: str, but: str | None = None) -> None:
    """Warn where a column `forget` marks rows, and something else that was given says what to forget.

    Args:
        but: the column that says it, where it is one.
    """
    for column in columns_of_marks(rows):
        if column == but or pa.types.is_nested(kind_of(rows, column)):
            continue
        marked = marked_rows(rows, column)
        if marked:
            logger.warning(
                f"The column `{column}` marks {len(marked)} rows to forget; {instead} takes its place, and the others of"
                " these rows are kept"
            )

"""The metadata of an image folder: `metadata.jsonl`, `metadata.csv` and `metadata.parquet`, as tables.

Values are kept as they are written. `datasets` would take the caption "2015-05-01" for a date and "NA" for none.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from siss_diffusers.data.text import read_text, split_lines
from siss_diffusers.errors import UsageError, describe_error


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
LINES_AT_A_TIME = 20_000
DELIMITERS = ",;\t"


def read_metadata(flag: str, file: Path) -> pa.Table:
    """Read the metadata of an image folder.

    Raises:
        UsageError: naming the flag and the file, for what is no such table.
    """
    readers = {".csv": read_csv, ".jsonl": read_json_lines, ".parquet": read_parquet}
    try:
        table = readers[file.suffix.lower()](file)
    except (OSError, ValueError, TypeError, RecursionError, pa.ArrowException) as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it") from error
    if not file_columns(table):
        only = f"only {', '.join(table.column_names)}" if table.column_names else "and no other"
        raise UsageError(f"{flag}: {file} has no column {FILE_NAME} of texts, {only}; add it, or remove the file")
    return table


def file_columns(table: pa.Table) -> dict[str, str]:
    """Return the columns that name files, and the columns of images that they become: `file_name` names `image`, and
    `mask_file_name` names `mask`."""
    named = {}
    for field in table.schema:
        if field.name == FILE_NAME or field.name.endswith(f"_{FILE_NAME}"):
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
                named[field.name] = field.name.removesuffix(FILE_NAME).removesuffix("_") or "image"
    return named


def read_json_lines(file: Path) -> pa.Table:
    """Read a file with a JSON object on each line.

    Raises:
        OSError, ValueError, RecursionError: if it is none.
    """
    lines = iter(enumerate(split_lines(read_text(file)), start=1))
    tables = []
    while part := list(islice(lines, LINES_AT_A_TIME)):
        rows = []
        for number, line in part:
            if line.strip():
                rows.append(json.loads(line, parse_float=WrittenFloat))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"line {number} is no object")
        names = dict.fromkeys(name for row in rows for name in row)
        if rows:
            tables.append(pa.table({name: column_of([row.get(name) for row in rows]) for name in names}))
    if not tables:
        raise ValueError("it has no lines")
    return concatenate(tables)


class WrittenFloat(float):
    """A number as JSON has it, with the text that it is written as."""

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number


def column_of(values: Sequence[Any]) -> pa.Array:
    """Make a column of JSON values. Values of several kinds become texts, as they are written, and so do numbers that a
    column of numbers would write in another way: 1 beside 2.5, and 1e5."""
    if any(isinstance(value, list) for value in values) and any(isinstance(value, str) for value in values):
        values = [value if isinstance(value, list | None) else [value] for value in values]
    try:
        if changes_in_a_column(values):
            raise pa.ArrowInvalid("numbers that are written in several ways")
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        if any(isinstance(value, list) for value in values):
            lists = [value if isinstance(value, list | None) else [value] for value in values]
            return pa.array([None if items is None else list(map(written, items)) for items in lists])
        return pa.array(list(map(written, values)), pa.string())


def changes_in_a_column(values: Sequence[Any]) -> bool:
    """Tell whether a column of numbers, or of lists of them, would not write each as it is written."""
    items = [item for value in values for item in (value if isinstance(value, list) else (value,))]
    floats = [item for item in items if isinstance(item, float)]
    if floats and any(type(item) is int for item in items):
        return True
    return any(written(item) != str(float(item)) for item in floats)


def written(value: Any) -> str | None:
    """Return a JSON value as it is written; a string without its quotes, and None for null."""
    if isinstance(value, WrittenFloat):
        return value.text
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


def read_csv(file: Path) -> pa.Table:
    """Read a CSV file, every value as the text that it is. An empty cell is no value; `""` is the empty text.

    The delimiter may be a comma, a semicolon or a tab: that which makes a column `file_name` of the first line.

    Raises:
        OSError, ValueError, pa.ArrowException: if it is none.
    """
    text = re.sub(r"\A([ \t]*[\r\n]+)+", "", read_text(file))  # the first line that is not blank has the names
    header = split_lines(text)[0]
    names, delimiter = [], ","
    for delimiter in DELIMITERS:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if any(name.endswith(FILE_NAME) for name in names):
            break
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name")
    table = pyarrow.csv.read_csv(
        io.BytesIO(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    # An empty row number column, which pandas writes, has no name.
    return table.select([name for name in table.column_names if name])


def read_parquet(file: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        OSError, pa.ArrowException: if it is none.
    """
    with pyarrow.parquet.ParquetFile(file) as content:
        table = content.read()
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return table


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Put tables below each other. A column that one of them lacks is null there; a column of several types becomes
    texts, and so does one of integers and other numbers."""
    try:
        if any(len({pa.types.is_integer(kind) for kind in kinds}) > 1 for kinds in numbers_of(tables).values()):
            raise pa.ArrowInvalid("numbers of two kinds")
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        names = dict.fromkeys(name for table in tables for name in table.column_names)
        whole = {}
        for name in names:
            columns = [
                table[name] if name in table.column_names else pa.nulls(len(table), pa.null()) for table in tables
            ]
            if len({column.type for column in columns} - {pa.null()}) > 1:
                whole[name] = column_of([value for column in columns for value in column.to_pylist()])
            else:
                kind = next((column.type for column in columns if column.type != pa.null()), pa.null())
                whole[name] = pa.concat_arrays(
                    [
                        chunk.cast(kind)
                        for column in columns
                        for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else [column])
                    ]
                )
        return pa.table(whole)


def numbers_of(tables: Sequence[pa.Table]) -> dict[str, set[pa.DataType]]:
    """Return the types of each column of numbers, or of lists of them."""
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            kind = field.type
            while pa.types.is_list(kind):
                kind = kind.value_type
            if pa.types.is_integer(kind) or pa.types.is_floating(kind):
                kinds.setdefault(field.name, set()).add(kind)
    return kinds

"""Columns of a data set as tables of Arrow, of the rows that it shows."""

import datasets
import pyarrow as pa
import pyarrow.compute as pc


def kind_of(rows: datasets.Dataset, column: str) -> pa.DataType:
    """Return the type of a column."""
    return rows.data.schema.field(column).type


def cells_of(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """Return the cells of a column, a cell for each row."""
    return as_shown(rows, rows.data.column(column))


def image_files(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """Return of each image its `path`, and whether it is `in_file` rather than in the data. No picture is copied."""
    kind = kind_of(rows, column)
    files = [
        pa.StructArray.from_arrays(
            [pc.struct_field(cells, "path"), pc.is_null(pc.struct_field(cells, "bytes"))], names=["path", "in_file"]
        )
        for cells in rows.data.column(column).chunks
    ]
    fields = pa.struct([("path", kind.field("path").type), ("in_file", pa.bool_())])
    return as_shown(rows, pa.chunked_array(files, fields))


def as_shown(rows: datasets.Dataset, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return values of the table below a data set in the order of its rows.

    `select`, `filter`, `sort`, `shuffle` and `train_test_split` leave the table as it is, and keep which rows of it they
    show. Their columns in the format "arrow" would be the same, and have a chunk for each row.
    """
    return values if rows._indices is None else values.take(rows._indices.column(0))

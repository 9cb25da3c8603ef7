"""Lists of prompts as people have them: lines of text, CSV, JSON lines, Parquet; with labels and reference images."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from siss_diffusers.data.text import read_prompt_lines, read_text, split_lines
from siss_diffusers.errors import UsageError, describe_error


DELIMITERS = ",;\t"
PROMPT_COLUMNS = ("text", "caption", "prompt")
NOT_MEMORIZED = ("", "0", "0.0", "false", "no", "none", "nan")

Row = dict[str, Any]


@dataclass(frozen=True)
class PromptList:
    """Prompts of a file, and what the file says of them.

    Args:
        prompts: each once, in their order.
        memorized: of each prompt, where there is a column of labels.
        references: of each prompt, the images it is said to reproduce, where there is a column of them.
        without: how many rows hold no prompt.
    """

    prompts: list[str]
    memorized: dict[str, bool] = field(default_factory=dict)
    references: dict[str, list[Path]] = field(default_factory=dict)
    without: int = 0


def read_prompt_list(
    flag: str,
    file: str,
    prompt_column: str | None = None,
    label_column: str | None = None,
    reference_column: str | None = None,
) -> PromptList:
    """Read a list of prompts. Its name says what it is: .csv or .tsv (separated by comma, semicolon or tab), .jsonl or
    .json (an object or a text on each line, or one array), .parquet; anything else holds a prompt on each line.

    Args:
        flag: where the file comes from, for messages.
        prompt_column: by default `text`, `caption` or `prompt`, in upper or lower case.
        label_column: a prompt is memorized unless this is empty, 0, false, no or none.
        reference_column: an image file for each row, relative to the folder of the list.

    Raises:
        UsageError: for a file that cannot be read or holds no prompt, a column that is not there, a prompt with two
            labels, or a reference that is no file.
    """
    columns = {
        "--prompt_column": prompt_column,
        "--label_column": label_column,
        "--reference_column": reference_column,
    }
    named = [f"{name} {column}" for name, column in columns.items() if column is not None]
    if named and not has_columns(file):
        raise UsageError(
            f"{named[0]}: {file} is read as lines of text, which have no columns; name a .csv, .jsonl or .parquet"
        )
    try:
        if not has_columns(file):
            return refuse_empty(flag, file, PromptList(list(dict.fromkeys(read_prompt_lines(file)))))
        rows = READERS[Path(file).suffix.lower()](file)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)})")
    if not rows:
        return refuse_empty(flag, file, PromptList([]))
    found = {name for row in rows for name in row}
    for name, column in columns.items():
        if column is not None and column not in found:
            raise UsageError(f"{name}: {file} has no column {column!r}")
    column = prompt_column or find_prompt_column(flag, file, found)
    prompts = [as_text(row.get(column)) for row in rows]
    kept = {prompt: None for prompt in prompts if prompt}
    listed = PromptList(
        list(kept),
        labels_of(file, rows, prompts, label_column),
        references_of(file, rows, prompts, reference_column),
        sum(not prompt for prompt in prompts),
    )
    return refuse_empty(flag, file, listed)


def has_columns(file: str) -> bool:
    """Tell whether a list is a table, by its name."""
    return Path(file).suffix.lower() in READERS


def refuse_empty(flag: str, file: str, listed: PromptList) -> PromptList:
    """Return a list that holds a prompt.

    Raises:
        UsageError: for one without.
    """
    if not listed.prompts:
        raise UsageError(f"{flag}: {file} holds no prompt; write one on each line, or drop the flag")
    return listed


def find_prompt_column(flag: str, file: str, found: set[str]) -> str:
    """Return the column of prompts where none is named.

    Raises:
        UsageError: unless exactly one has such a name. It does not print the names that there are: without a header the
            first prompt would be one of them.
    """
    matching = [name for name in found if name.strip().lower() in PROMPT_COLUMNS]
    if len(matching) == 1:
        return matching[0]
    several = (
        f"has the columns {' and '.join(sorted(matching))}" if matching else "names no column text, caption or prompt"
    )
    raise UsageError(f"{flag}: {file} {several}; say by --prompt_column which holds the prompts")


def labels_of(file: str, rows: list[Row], prompts: list[str], column: str | None) -> dict[str, bool]:
    """Return which prompts are labelled memorized.

    Raises:
        UsageError: for a prompt with both labels.
    """
    memorized: dict[str, bool] = {}
    if column is None:
        return memorized
    for row, prompt in zip(rows, prompts):
        label = as_text(row.get(column)).lower() not in NOT_MEMORIZED
        if prompt and memorized.setdefault(prompt, label) != label:
            raise UsageError(
                f"--label_column: {file} labels one prompt both memorized and not; correct one of the rows"
            )
    return memorized


def references_of(file: str, rows: list[Row], prompts: list[str], column: str | None) -> dict[str, list[Path]]:
    """Return the reference images of each prompt, an absolute path or one below the folder of the list.

    Raises:
        UsageError: for an address, or a file that is not there.
    """
    references: dict[str, list[Path]] = {}
    if column is None:
        return references
    for row, prompt in zip(rows, prompts):
        name = as_text(row.get(column))
        if not prompt or not name:
            continue
        if "://" in name:
            raise UsageError(
                f"--reference_column: {column!r} of {file} holds addresses; download the images and name files"
            )
        image = Path(file).parent / name
        if not image.is_file():
            raise UsageError(f"--reference_column: {image} is not there; correct the path in {file}")
        if image not in references.setdefault(prompt, []):
            references[prompt].append(image)
    return references


def as_text(value: Any) -> str:
    """Return a cell as a text without white space around it: of a list the first."""
    while isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value).strip()


def read_csv(file: str) -> list[Row]:
    """Read a table with a header. The separator is the one that splits the header into most columns. Quotes within a cell
    that is not quoted are part of it.

    Raises:
        ValueError: for two columns of one name, a row of another length than the header, or a cell whose quote is never closed.
    """
    text = read_text(file)
    delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader(split_lines(text)[:1], delimiter=mark), [])))
    lines = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise ValueError("two of its columns have the same name; rename one")
    rows = []
    for cells in lines:
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            raise ValueError(
                f"line {lines.line_num} has {len(cells)} cells and the header {len(header)}; put cells that hold"
                f" {delimiter!r} into quotes"
            )
        rows.append(dict(zip(header, cells)))
    return rows


def read_jsonl(file: str) -> list[Row]:
    """Read JSON: an object or a text on each line, or one array of them.

    Raises:
        ValueError: for anything else.
    """
    text = read_text(file)
    if text.lstrip().startswith("["):
        return list(as_rows(enumerate(json.loads(text), start=1), "entry"))
    numbered = ((number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip())

    def parsed() -> Iterator[tuple[int, Any]]:
        for number, line in numbered:
            try:
                yield number, json.loads(line)
            except ValueError:
                raise ValueError(f"line {number} is not valid JSON")

    return list(as_rows(parsed(), "line"))


def as_rows(numbered: Iterable[tuple[int, Any]], what: str) -> Iterator[Row]:
    """Turn values into rows; a text is a row with a prompt alone.

    Raises:
        ValueError: for a value that is neither an object nor a text.
    """
    for number, value in numbered:
        if not isinstance(value, dict | str):
            raise ValueError(f"{what} {number} is neither an object nor a text")
        yield {PROMPT_COLUMNS[0]: value} if isinstance(value, str) else value


def read_parquet(file: str) -> list[Row]:
    """Read a Parquet file; its columns of objects and bytes are left out.

    Raises:
        ValueError: if it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_plain(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_plain(kind.value_type)
        return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    try:
        schema = pq.read_schema(file)
        return pq.read_table(file, columns=[column.name for column in schema if is_plain(column.type)]).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(describe_error(error))


READERS: dict[str, Callable[[str], list[Row]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
}

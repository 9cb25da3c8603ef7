"""Values of a column, as people write them."""

import logging
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siss_diffusers.data.cells import cells_of, kind_of
from siss_diffusers.errors import UsageError


logger = logging.getLogger(__name__)

# What people write for yes and no, without regard to case.
YES = frozenset({"true", "t", "yes", "y", "on", "1", "1.0", "forget"})
NO = frozenset({"false", "f", "no", "n", "off", "0", "0.0", "keep", "retain", ""})
NUMBERS = frozenset({"0", "0.0", "1", "1.0"})
# A column of yes and no has few spellings of them.
MAX_SPELLINGS = 16
# A number as JSON writes it. 007 is none, and may be the name of somebody.
WRITTEN_NUMBER = r"^\s*-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,4})?\s*$"


class NoSuchValue(UsageError):
    """No row has the value of --forget_value."""


def spelled(value: Any) -> str:
    """Return a value as people write it, without regard to case and white space around it."""
    return str(value).strip().lower()


def value_names(rows: datasets.Dataset, column: str) -> Callable[[Any], str]:
    """Return what names a value of a column: of a class its name, of anything else the value as a text."""
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return str
    return lambda number: feature.names[number] if number < len(feature.names) else str(number)


def distinct_values(rows: datasets.Dataset, column: str, limit: int) -> list[Any]:
    """Return up to `limit` + 1 distinct values of a column, without null, and of classes without -1, which is none."""
    values: dict[Any, None] = {}
    is_class = isinstance(rows.features[column], datasets.ClassLabel)
    for chunk in cells_of(rows, column).chunks:
        for value in chunk.unique()[: limit + 2].to_pylist():
            is_missing = value is None or value != value  # a missing number is not a number to pandas
            if not is_missing and not (is_class and value < 0):
                values[value] = None
        if len(values) > limit:
            break
    return list(values)[: limit + 1]


def marked_rows(rows: datasets.Dataset, column: str) -> list[int] | None:
    """Return the rows that a column of yes and no marks; no value is no. None for a column that holds anything else.

    Yes and no may be booleans, the numbers 1 and 0, or words such as `true`, `yes`, `forget` and `keep`.
    """
    cells, name_of = cells_of(rows, column), value_names(rows, column)
    if pa.types.is_boolean(cells.type):
        return rows_where(cells, lambda values: pc.fill_null(values, False)).tolist()
    distinct = distinct_values(rows, column, MAX_SPELLINGS)
    names = {value: spelled(name_of(value)) for value in distinct}
    if len(distinct) > MAX_SPELLINGS or not set(names.values()) <= YES | NO:
        return None
    wanted = [value for value, name in names.items() if name in YES]
    return rows_among(cells, wanted)


def holds_numbers(rows: datasets.Dataset, column: str) -> bool:
    """Tell whether a column of yes and no, which is not of booleans, holds nothing but 0 and 1."""
    if pa.types.is_boolean(kind_of(rows, column)):
        return False
    name_of = value_names(rows, column)
    return {spelled(name_of(value)) for value in distinct_values(rows, column, MAX_SPELLINGS)} <= NUMBERS


def rows_among(cells: pa.ChunkedArray, wanted: Sequence[Any]) -> list[int]:
    """Return the rows that hold one of these values."""
    if not wanted:
        return []
    known = pa.array(wanted, cells.type)
    return rows_where(cells, lambda values: pc.is_in(values, known)).tolist()


def describe_values(rows: datasets.Dataset, column: str) -> str:
    """Return the type of a column and examples of what it holds, for messages: yes and no, numbers, and names of classes.
    Other values are counted, for they may be captions, and those of memorized images."""
    kind, name_of = kind_of(rows, column), value_names(rows, column)
    is_class = isinstance(rows.features[column], datasets.ClassLabel)
    values = distinct_values(rows, column, 3)[:3]
    texts = [value for value in values if isinstance(value, str)]
    shown = [repr(text) for text in texts if spelled(text) in YES | NO or re.search(WRITTEN_NUMBER, text)]
    if is_class or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        shown = [str(name_of(value)) for value in values]
    described = f"is of type {'classes' if is_class else kind} and holds "
    if len(shown) == len(values):
        return described + (", ".join(shown) or "nothing")
    count = pc.count_distinct(cells_of(rows, column), mode="only_valid").as_py()
    return described + f"{count} distinct values" + (f", such as {', '.join(shown)}" if shown else "")


def rows_with_value(rows: datasets.Dataset, column: str, wanted: str) -> list[int]:
    """Return the rows whose value in a column is `wanted`, as people write it.

    Raises:
        NoSuchValue: naming the column, its type and an example, where no row has it.
        UsageError: where it could be misread.
    """
    cells, feature = cells_of(rows, column), rows.features[column]
    few = distinct_values(rows, column, MAX_SPELLINGS)
    is_yes_or_no = len(few) <= MAX_SPELLINGS and all(spelled(value) in YES | NO for value in few)
    side = next((side for side in (YES, NO - {""}) if spelled(wanted) in side), None)
    if isinstance(feature, datasets.ClassLabel):
        matching = matching_classes(feature, column, wanted)
    elif pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        matching = matching_words(few, wanted) if is_yes_or_no else []
        matching = matching or matching_texts(cells, column, wanted)
    elif is_yes_or_no and side:
        matching = [value for value in few if spelled(value) in side]
    else:
        matching = matching_values(cells, wanted)
    found = rows_among(cells, matching)
    if not found:
        raise NoSuchValue(
            f"--forget_value: no row has {wanted!r} in the column `{column}`, which {describe_values(rows, column)}"
        )
    return found


def matching_classes(feature: datasets.ClassLabel, column: str, wanted: str) -> list[int]:
    """Return the number of the class of this name or number. A name that is the same exactly wins.

    Raises:
        UsageError: where it may mean several, and is the name of none exactly.
    """
    exact = [number for number, name in enumerate(feature.names) if name == wanted]
    by_name = exact or [number for number, name in enumerate(feature.names) if spelled(name) == spelled(wanted)]
    by_number = [int(wanted)] if re.fullmatch(r"\d+", wanted) and int(wanted) < len(feature.names) else []
    classes = sorted({*by_name, *by_number})
    if len(classes) > 1 and exact:
        other = feature.names[by_number[0]]
        logger.warning(
            f"The column `{column}`: {wanted!r} is taken for the name of a class, not for number {wanted}, {other!r}"
        )
        return exact
    if len(classes) > 1:
        meant = " and ".join(f"{feature.names[number]!r} (number {number})" for number in classes)
        raise UsageError(
            f"--forget_value: {wanted!r} may mean {meant} in the column `{column}`; write one name exactly"
        )
    return classes


def matching_words(words: Sequence[str], wanted: str) -> list[str]:
    """Return those of some words of yes and no that say the same as `wanted`; none where a text may be meant as it stands.

    That is one that is there exactly, and any where some are letters, which may be initials: of F, N, NO and T, N is not
    NO.
    """
    side = next((side for side in (YES, NO - {""}) if spelled(wanted) in side), frozenset())
    letters = [word for word in words if len(spelled(word)) == 1 and spelled(word).isalpha()]
    if wanted in words or any(spelled(word) == spelled(wanted) for word in letters):
        return []
    return [word for word in words if spelled(word) in side]


def matching_texts(cells: pa.ChunkedArray, column: str, wanted: str) -> list[str]:
    """Return the texts of a column that are `wanted`: those of the same number, or that which is the same exactly, or but
    for case and white space around it.

    Raises:
        UsageError: where several texts differ by that alone and none is the same exactly.
    """
    numbers = matching_numbers(cells, wanted)
    if numbers:
        if len(numbers) > 1:
            logger.warning(f"The column `{column}`: {', '.join(map(repr, numbers))} are one number, {wanted}")
        return numbers
    key = pa.scalar(spelled(wanted), cells.type)
    alike: set[str] = set()
    for chunk in cells.chunks:
        is_alike = pc.equal(pc.utf8_lower(pc.utf8_trim_whitespace(chunk)), key)
        alike |= set(chunk.filter(is_alike).unique().to_pylist())
    spellings = sorted(alike)
    if wanted in alike:
        others = [text for text in spellings if text != wanted]
        if others:
            logger.warning(
                f"The column `{column}` also holds {len(others)} texts that differ from --forget_value in case or white space"
                " alone, which are not forgotten"
            )
        return [wanted]
    if len(spellings) > 1:
        raise UsageError(
            f"--forget_value: {wanted!r} may mean {' or '.join(map(repr, spellings))} in the column `{column}`; write it"
            " exactly"
        )
    return spellings


def matching_numbers(cells: pa.ChunkedArray, wanted: str) -> list[str]:
    """Return the texts that are the number `wanted`, however they write it: a column of 1, 1.0 and 2.5 may hold texts, so
    that captions stay as they are written."""
    if not re.search(WRITTEN_NUMBER, wanted):
        return []
    number = Decimal(wanted.strip())
    matching: set[str] = set()
    for chunk in cells.chunks:
        written = chunk.filter(pc.match_substring_regex(chunk, WRITTEN_NUMBER)).unique().to_pylist()
        matching |= {text for text in written if Decimal(text.strip()) == number}
    return sorted(matching)


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
    """Return the numbers of the rows for which `condition` holds, `(M,)` int64. A chunk at a time: what it makes of a column of a
    million rows never lies in memory at once."""
    found, first = [np.empty(0, dtype=np.int64)], 0
    for values in column.chunks:
        found.append(np.flatnonzero(condition(values).to_numpy(zero_copy_only=False)) + first)
        first += len(values)
    return np.concatenate(found)

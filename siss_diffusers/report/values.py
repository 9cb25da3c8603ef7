"""Read the content of an `evaluation.json` in which any entry may be missing, null or of another type."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from siss_diffusers.metrics.formats import interval_percent


# The figures and settings of one model, or of one row of a test.
Entries = Mapping[str, Any]


def as_mapping(value: Any) -> Entries:
    """Return `value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_rows(value: Any) -> list[Entries]:
    """Return the mappings in a list. Return an empty list if `value` is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, Sequence) else []


def as_number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None. A bool is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def is_identifier(name: Any) -> bool:
    """Tell whether a key can be shown: an identifier of a program, not a prompt or a path."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", name) is not None


def unique(names: Iterable[Any]) -> list[Any]:
    """Return the names without repetitions, in their order."""
    return list(dict.fromkeys(names))


def interval_of(entries: Entries, key: str = "copy_share") -> tuple[float, float] | None:
    """Return the 95 % interval of a share, or None where it is not recorded."""
    low, high = as_number(entries.get(f"{key}_low")), as_number(entries.get(f"{key}_high"))
    return None if low is None or high is None else (low, high)


def interval_phrase(entries: Entries) -> str:
    """Write the 95 % interval of a share of copies for a sentence."""
    interval = interval_of(entries)
    if interval is None:
        return "no interval is recorded"
    return "95 % interval {} to {} %".format(*interval_percent(*interval))


def upper_percent(share: float) -> str:
    """Write the upper end of an interval in percent, rounded upwards."""
    return f"{interval_percent(0, share)[1]} %"


def model_phrase(name: str) -> str:
    """Name a model in a sentence."""
    return {"base": "the base", "unlearned": "the unlearned model"}.get(name, f"the model “{name}”")

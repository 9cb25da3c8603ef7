"""The table of figures for a terminal."""

from collections.abc import Mapping
from typing import Any

from siss_diffusers.metrics import METRICS
from siss_diffusers.metrics.formats import interval_percent


MIN_COLUMN = 16


def format_summary(content: Mapping[str, Any]) -> str:
    """Return a table with a row for each metric that was measured and a column for each model.

    Args:
        content: as in `evaluation.json`.
    """
    names = [name for name in content if name != "settings"]
    rows = [["", *names]]
    for metric in METRICS.values():
        values = [content[name].get(metric.key) for name in names]
        if any(value is not None for value in values):
            rows.append([metric.label, *("-" if value is None else metric.format(value) for value in values)])
            if any(f"{metric.key}_low" in content[name] for name in names):
                rows.append(["  95 % interval, %", *(_interval(content[name], metric.key) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    widths[1:] = [max(width, MIN_COLUMN - 2) for width in widths[1:]]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(lines)


def _interval(figures: Mapping[str, Any], key: str) -> str:
    if figures.get(key) is None:
        return "-"
    return "{} to {}".format(*interval_percent(figures[f"{key}_low"], figures[f"{key}_high"]))

"""The tables of the report. Each function returns plain data; `page.html.jinja` turns it into HTML."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from siss_diffusers.metrics import METRICS, Metric
from siss_diffusers.metrics.copies import DETECTORS
from siss_diffusers.metrics.damage import DAMAGES
from siss_diffusers.metrics.formats import four_digits, interval_percent, percent, short_number
from siss_diffusers.report.values import Entries, as_mapping, as_number, as_rows, interval_of, is_identifier, unique


# The chapters of `Metric.chapter`, in the order of the page.
CHAPTERS = {
    "copies": "Copies",
    "instead": "What comes instead of copies",
    "rest": "What the model still does",
    "memory": "What the model still knows of the images",
    "other": "Other figures",
}


class Cell(NamedTuple):
    """One figure of a table: its text, its interval or spread, and `good` or `bad` where it is one of these."""

    text: str
    interval: str = ""
    tone: str = ""


DASH = Cell("–")


@dataclass(frozen=True)
class Row:
    """One row of a table, with an explanation below it where there is one."""

    label: str
    cells: Sequence[Cell]
    explanation: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: what it shows, for screen readers.
        head: the heads of all columns, also of the first one, which holds the labels.
        groups: the rows by the heading above them; the heading may be empty.
    """

    name: str
    head: Sequence[str]
    groups: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    @property
    def has_gaps(self) -> bool:
        """Tell whether a dash stands in the table."""
        return any(cell == DASH for rows in self.groups.values() for row in rows for cell in row.cells)

    @property
    def has_explanations(self) -> bool:
        """Tell whether rows are explained."""
        return any(row.explanation for rows in self.groups.values() for row in rows)


def share_cell(entries: Entries, key: str = "copy_share", show: Callable[[float], str] = percent) -> Cell:
    """Return a share with its 95 % interval, where that is recorded."""
    share, interval = as_number(entries.get(key)), interval_of(entries, key)
    if share is None:
        return DASH
    return Cell(show(share), "[{}, {}]".format(*interval_percent(*interval)) if interval is not None else "")


def plain_cell(value: Any, show: Callable[[float], str]) -> Cell:
    """Return a number as a cell, or a dash."""
    return DASH if as_number(value) is None else Cell(show(value))


def undescribed_figures(models: Mapping[str, Entries]) -> list[str]:
    """Return the keys of plain numbers that are no part of a metric's entry."""
    parts = {
        part for key, metric in METRICS.items() for part in (key, f"{key}_low", f"{key}_high", metric.spread) if part
    }
    entries = [entry for figures in models.values() for entry in figures.items()]
    return unique(
        key for key, value in entries if key not in parts and is_identifier(key) and as_number(value) is not None
    )


def figures_table(models: Mapping[str, Entries]) -> Table | None:
    """Return the figures that exist, by chapter. A row is a metric, a column is a model."""
    groups: dict[str, list[Row]] = {title: [] for title in CHAPTERS.values()}
    for key, metric in METRICS.items():
        if any(as_number(figures.get(key)) is not None for figures in models.values()):
            cells = [figure_cell(metric, figures) for figures in models.values()]
            groups[CHAPTERS[metric.chapter]].append(Row(metric.label, cells, metric.explanation))
    for key in undescribed_figures(models):
        cells = [plain_cell(figures.get(key), four_digits) for figures in models.values()]
        groups[CHAPTERS["other"]].append(Row(key, cells, "The evaluation recorded this figure without a description."))
    groups = {title: rows for title, rows in groups.items() if rows}
    return Table("Figures", ["Metric", *models], groups) if groups else None


def figure_cell(metric: Metric, figures: Entries) -> Cell:
    """Return a metric's figure with its interval or its standard deviation."""
    cell = share_cell(figures, metric.key, metric.format)
    spread = as_number(figures.get(metric.spread)) if metric.spread else None
    if spread is None or cell == DASH:
        return cell
    return cell._replace(interval=f"± {short_number(spread)}")


def detectors_table(models: Mapping[str, Entries], settings: Entries) -> Table | None:
    """Return the share of copies by detector, with what each detector looks at."""
    thresholds = as_mapping(settings.get("detectors"))
    shares = [as_mapping(figures.get("copy_share_by_detector")) for figures in models.values()]
    detectors = unique([*thresholds, *(name for row in shares for name in row)])
    rows = []
    for detector in detectors:
        if detector != "any":
            cells = [plain_cell(row.get(detector), percent) for row in shares]
            rows.append(Row(detector, cells, explain_detector(detector, as_mapping(thresholds.get(detector)))))
    if not rows:
        return None
    rows.append(Row("any", [share_cell(figures) for figures in models.values()], f"{DETECTORS['any']}."))
    return Table("Copies by detector", ["Detector", *models], {"": rows})


def explain_detector(detector: str, calibration: Entries) -> str:
    """Say what a detector looks at and give its numbers."""
    numbers = [
        f"{key} {short_number(value)}"
        for key, value in calibration.items()
        if is_identifier(key) and as_number(value) is not None
    ]
    explanation = DETECTORS.get(detector, "This report has no description of the detector")
    return f"{explanation} ({', '.join(numbers) or 'no threshold is recorded'})."


def damage_table(settings: Entries) -> Table | None:
    """Return which damaged copies each detector caught and which images to keep it flagged."""
    damaged, flagged = as_mapping(settings.get("damage_table")), as_mapping(settings.get("keep_flagged"))
    detectors = unique([*damaged, *flagged])
    rows = []
    for damage in unique(damage for row in damaged.values() for damage in as_mapping(row)):
        cells = [caught_cell(as_mapping(damaged.get(detector)).get(damage)) for detector in detectors]
        rows.append(Row(DAMAGES.get(damage, damage), cells))
    groups = {"Damaged copies, share caught": rows} if rows else {}
    shares = [plain_cell(flagged.get(detector), percent) for detector in detectors]
    if any(cell != DASH for cell in shares):
        groups["Images to keep, share flagged"] = [Row("all", shares)]
    return Table("Checks of the detectors", ["", *detectors], groups) if groups else None


def caught_cell(value: Any) -> Cell:
    """Say whether a damaged copy was flagged, or which share of several."""
    if isinstance(value, bool):
        return Cell("caught", tone="good") if value else Cell("missed", tone="bad")
    if as_number(value) is None:
        return DASH
    return Cell(percent(value), tone={1: "good", 0: "bad"}.get(value, ""))


def injection_table(models: Mapping[str, Entries]) -> Table | None:
    """Return how similar a noised and denoised forgotten image is to itself, by time."""
    columns = {name: as_mapping(figures.get("injection")) for name, figures in models.items()}
    columns = {
        name: row for name, row in columns.items() if any(as_number(value) is not None for value in row.values())
    }
    times = sorted(unique(time for row in columns.values() for time in row), key=numeric_order)
    rows = [
        Row(f"t = {time}", [plain_cell(row.get(time), "{:.3f}".format) for row in columns.values()]) for time in times
    ]
    return Table("Injection", ["Noised to", *columns], {"": rows}) if rows else None


def numeric_order(key: str) -> tuple[bool, float]:
    """Sort keys of a JSON object, which are always text, as the numbers that they hold; other keys come last."""
    try:
        return False, float(key)
    except ValueError:
        return True, 0.0


def measured_points(figures: Entries, test: str, label: str) -> dict[float, Entries]:
    """Return the rows of a test that have a share of copies, by the number under `label`, in its order."""
    rows = {
        as_number(row.get(label)): row
        for row in as_rows(figures.get(test))
        if as_number(row.get(label)) is not None and as_number(row.get("copy_share")) is not None
    }
    return dict(sorted(rows.items()))


def variations_table(models: Mapping[str, Entries], test: str, label: str, title: str, head: str) -> Table | None:
    """Return the share of copies of a test with several points. A row is a point, a column is a measured model."""
    columns = {name: measured_points(figures, test, label) for name, figures in models.items()}
    columns = {name: points for name, points in columns.items() if points}
    places = sorted({place for points in columns.values() for place in points})
    rows = [
        Row(short_number(place), [share_cell(points.get(place, {})) for points in columns.values()])
        for place in places
    ]
    return Table(title, [head, *columns], {"": rows}) if rows else None


def bits_table(models: Mapping[str, Entries]) -> Table | None:
    """Return the bits that a model lost of forgotten images, of pictures never seen and of images to keep."""
    columns = {name: as_mapping(figures.get("memorized_bits_by_condition")) for name, figures in models.items()}
    columns = {name: column for name, column in columns.items() if column}
    kinds = {"forget": "forgotten images", "strangers": "pictures never seen", "keep": "images to keep"}
    rows = []
    for condition, phrase in {"prompt": "with the prompt", "empty": "with the empty prompt"}.items():
        for kind, title in kinds.items():
            cells = [bits_cell(as_mapping(column.get(condition)), kind) for column in columns.values()]
            if any(cell != DASH for cell in cells):
                rows.append(Row(f"{title}, {phrase}", cells))
    return Table("Bits by condition", ["Bits less than in the base", *columns], {"": rows}) if rows else None


def bits_cell(row: Entries, kind: str) -> Cell:
    """Return a number of bits with its standard error."""
    cell, error = plain_cell(row.get(kind), four_digits), as_number(row.get(f"{kind}_se"))
    return cell if error is None or cell == DASH else cell._replace(interval=f"± {short_number(error)}")

"""The embedding attack in the report: its table, its curve and its line in the verdict."""

from collections.abc import Mapping
from typing import Any

from siss_diffusers.metrics.formats import percent, short_number
from siss_diffusers.report.tables import Row, Table, share_cell
from siss_diffusers.report.values import Entries, as_mapping, as_number, as_rows, interval_of, interval_phrase


KEY = "embedding_attack"
# As the metric names them; another name could be a prompt and is not shown.
START_PHRASES = {
    "prompt": "the prompt",
    "empty": "the empty prompt",
    "other": "another prompt",
    "gauss": "Gaussian noise",
}
PREFIX = "control_"  # of the figures of pictures that the model never saw


def attack_points(figures: Entries) -> dict[tuple[str, float, float], Entries]:
    """Return the rows of an attack by start, guidance scale and steps."""
    points = {}
    for start, rows in as_mapping(figures.get(KEY)).items():
        for row in as_rows(rows):
            place = start, as_number(row.get("guidance")), as_number(row.get("step"))
            if start in START_PHRASES and None not in place:
                points[place] = row
    return points


def shares(points: Mapping[Any, Entries], prefix: str = "") -> dict[Any, Entries]:
    """Return the share of copies and its interval of rows that have them: of forget images, or under `PREFIX`."""
    keys = ("copy_share", "copy_share_low", "copy_share_high")
    rows = {place: {key: row.get(prefix + key) for key in keys} for place, row in points.items()}
    return {place: row for place, row in rows.items() if as_number(row["copy_share"]) is not None}


def attack_table(models: Mapping[str, Entries]) -> Table | None:
    """Return the share of copies by start, guidance and steps: for each model of forget images and of controls."""
    columns = {}
    for name, figures in models.items():
        for title, prefix in ((name, ""), (f"{name}, never seen", PREFIX)):
            if rows := shares(attack_points(figures), prefix):
                columns[title] = rows
    places = list(dict.fromkeys(place for rows in columns.values() for place in rows))
    rows = [
        Row(
            f"{START_PHRASES[start]}, guidance {short_number(guidance)}, {short_number(step)} steps",
            [share_cell(column.get((start, guidance, step), {})) for column in columns.values()],
        )
        for start, guidance, step in places
    ]
    return Table("Embedding attack", ["Search from", *columns], {"": rows}) if rows else None


def attack_curves(models: Mapping[str, Entries]) -> dict[str, dict[float, Entries]]:
    """Return by line the highest share, of all starts and guidance scales, by steps; empty where there is one point."""
    curves: dict[str, dict[float, Entries]] = {}
    for name, figures in models.items():
        for title, prefix in ((name, ""), (f"{name}, never seen", PREFIX)):
            for (_, _, step), row in shares(attack_points(figures), prefix).items():
                worst = curves.setdefault(title, {}).get(step)
                if worst is None or row["copy_share"] > worst["copy_share"]:
                    curves[title][step] = row
    curves = {title: dict(sorted(points.items())) for title, points in curves.items()}
    return curves if any(len(points) > 1 for points in curves.values()) else {}


def forgotten_sentence(figures: Entries) -> str:
    """Say whether what is forgotten stays so under a search, beside what the search does with pictures never seen."""
    points = attack_points(figures)
    last = max((step for _, _, step in points), default=None)
    points = {place: row for place, row in points.items() if place[2] == last}
    forget, controls = shares(points), shares(points, PREFIX)
    if not forget:
        return ""
    (start, guidance, _), worst = max(forget.items(), key=lambda item: item[1]["copy_share"])
    found = (
        f"Does it stay forgotten? After {short_number(last)} steps of search of the text-embedding space up to"
        f" {percent(worst['copy_share'])} of the samples are copies (from {START_PHRASES[start]}, guidance"
        f" {short_number(guidance)}; {interval_phrase(worst)})"
    )
    if not controls:
        return f"{found}. No picture that the model never saw was searched beside it, so the figure has no floor."
    floor = max(controls.values(), key=lambda row: row["copy_share"])
    interval, of_floor = interval_of(worst), interval_of(floor)
    beside = f"{found}; of pictures that it never saw, {percent(floor['copy_share'])} ({interval_phrase(floor)})"
    if interval is None or of_floor is None:
        return f"{beside}."
    if interval[0] > of_floor[1]:
        return f"{beside}. The image can still be found."
    return f"{beside}. That is no more than a picture that was never trained on."

"""The ranked prompts of an audit: which are flagged, as a table and as a chart."""

import csv
from math import inf
from pathlib import Path

from siss_diffusers.commands.common import count_of


MEASURES = ("self_similarity", "noise_norm", "noise_norm_first", "best_match")
SHOWN_IN_CHART, SHOWN_IN_TABLE = 40, 20


def compare_with_ordinary(rows: list[dict], ordinary: list[dict]) -> None:
    """Add to each row its p-values and whether it is flagged.

    The p-value of a measure is that of a permutation test: the share of the ordinary prompts, and this prompt itself,
    that reach its value. A prompt is flagged if it exceeds all ordinary prompts in some measure. Ordinary prompts of
    which a measure is not known are no comparison in it, and a prompt of which none is known is neither flagged nor
    cleared: None.
    """
    for row in rows:
        row["p_values"], exceeds = {}, False
        for name in MEASURES:
            others = [other[name] for other in ordinary if other.get(name) is not None]
            if row.get(name) is not None and (others or not ordinary):
                reaching = sum(other >= row[name] for other in others)
                row["p_values"][name] = (1 + reaching) / (1 + len(others))
                exceeds = exceeds or (bool(others) and reaching == 0)
        row["flagged"] = exceeds if row["p_values"] else None


def separate(rows: list[dict], memorized: dict[str, bool]) -> dict[str, dict]:
    """Return how well each measure tells labelled prompts apart.

    Args:
        memorized: whether a prompt is; prompts without a label, and those of which a measure is not known, are left out.

    Returns:
        For each measure that is known of prompts of both kinds, `Separation` as a dictionary and the numbers of prompts.
    """
    from siss_diffusers.metrics.separation import separation

    found = {}
    for name in MEASURES:
        scores: dict[bool, list[float]] = {True: [], False: []}
        for row in rows:
            if row["prompt"] in memorized and row.get(name) is not None:
                scores[memorized[row["prompt"]]].append(row[name])
        if scores[True] and scores[False]:
            numbers = {"memorized": len(scores[True]), "not_memorized": len(scores[False])}
            found[name] = separation(scores[True], scores[False])._asdict() | numbers
    return found


def rank_rows(rows: list[dict], rank_by: str) -> list[dict]:
    """Sort rows by a measure, the highest first, and number them. Rows without it come last."""
    rows = sorted(rows, key=lambda row: -(row[rank_by] if row[rank_by] is not None else -inf))
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """Write the rows as CSV."""
    columns = ["rank", "number", "flagged", "broken", *MEASURES, "best_match_file", "prompt"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw_chart(path: Path, rows: list[dict], ordinary: list[dict], measure: str) -> None:
    """Draw the first rows of the table as bars, and a line at the highest ordinary prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = rows[:SHOWN_IN_CHART]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.22 * len(shown)), layout="constrained")
    colors = ["tab:red" if row["flagged"] else "tab:blue" for row in shown]
    axis.barh(range(len(shown)), [row[measure] or 0 for row in shown], color=colors)
    axis.set_yticks(range(len(shown)), [f"prompt {row['number']}" for row in shown], fontsize=8)
    axis.invert_yaxis()
    if ordinary:
        highest = max((row[measure] for row in ordinary if row[measure] is not None), default=None)
        if highest is not None:
            axis.axvline(highest, color="grey", linestyle=":", label="highest ordinary prompt")
            axis.legend(frameon=False)
    axis.set_xlabel(measure)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(rows: list[dict], ordinary: list[dict], show_prompts: bool) -> None:
    """Print the first rows. Prompts are shown only on request: they may be what has to be forgotten."""
    measures = [name for name in MEASURES if any(row.get(name) is not None for row in rows)]
    print(f"\n{'rank':>4} {'prompt':>8} {'':7}" + "".join(f"{name:>18}" for name in measures))

    def format_figures(row: dict) -> str:
        return "".join(f"{'-' if row[name] is None else format(row[name], '.3f'):>18}" for name in measures)

    for row in rows[:SHOWN_IN_TABLE]:
        mark = "flagged" if row["flagged"] else "unknown" if row["flagged"] is None else ""
        text = f"  {row['prompt']}" if show_prompts else ""
        print(f"{row['rank']:4} {row['number']:>8} {mark:7}{format_figures(row)}{text}")
    if len(rows) > SHOWN_IN_TABLE:
        print(f"... and {len(rows) - SHOWN_IN_TABLE} more")
    print_broken(rows)
    if not ordinary:
        print("\nNo prompt is flagged: --ordinary_prompts_file says what is ordinary.")
        return
    highest = {name: max((row[name] for row in ordinary if row[name] is not None), default=None) for name in measures}
    print(f"{'':4} {'highest of ' + str(len(ordinary)) + ' ordinary':16}{format_figures(highest)}")
    print(
        f"\n{sum(bool(row['flagged']) for row in rows)} of {len(rows)} prompts exceed all {len(ordinary)} ordinary"
        f" prompts in a measure. Of ordinary prompts, 1 in {len(ordinary) + 1} would, in each measure."
    )


def print_separations(separations: dict[str, dict]) -> None:
    """Print how well each measure tells memorized prompts from others, as `separate` found."""
    if not separations:
        return
    print("\nHow well a measure tells memorized prompts from others, with 95 % intervals:")
    print(f"{'':18}{'AUC':>24}{'found at 1 % false alarms':>30}")
    for name, found in separations.items():
        auc = f"{found['auc']:.3f} [{found['auc_low']:.3f}, {found['auc_high']:.3f}]"
        tpr = f"{100 * found['tpr']:.0f} % [{100 * found['tpr_low']:.0f}, {100 * found['tpr_high']:.0f}]"
        print(f"{name:18}{auc:>24}{tpr:>30}")
    numbers = {(found["memorized"], found["not_memorized"]) for found in separations.values()}
    print("Prompts: " + "; ".join(f"{some} memorized, {others} not" for some, others in sorted(numbers)))


def print_broken(rows: list[dict]) -> None:
    """Say of how many prompts samples were no pictures, and how many could not be measured at all."""
    from siss_diffusers.metrics.base import NO_PICTURE

    broken = sum(bool(row.get("broken")) for row in rows)
    unknown = sum(row["flagged"] is None for row in rows)
    if broken:
        print(f"\n{count_of(broken, 'prompt')} with broken samples ({NO_PICTURE}), which were left out.")
    if unknown:
        print(f"{count_of(unknown, 'prompt')} could not be measured, and may be memorized: try --dtype float32.")

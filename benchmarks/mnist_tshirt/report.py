"""Tables and plots of the experiment: `python benchmarks/mnist_tshirt/report.py results.jsonl [--readme README.md]`.

Prints the tables and writes `pareto.png` and `calibration.png` beside the results. With `--readme FILE ...` each table replaces
what is between its two marks there: `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run import chosen_setting, forgotten
from settings import COMPARED, LONGER, RECOMMENDED, SWEEP, THOROUGH, describe
from tables import replace_tables, table

from siss_diffusers.metrics.copies import wilson_interval


Line = dict[str, object]

# Key, factor, digits, and what it is called in a table.
COLUMNS = (
    ("injected_copy_share", 100, 1, "injected copies, %"),
    ("nll_forget_bpd", 1, 2, "NLL garment"),
    ("nll_keep_bpd", 1, 2, "NLL digits"),
    ("inception_score", 1, 2, "inception score"),
    ("fid", 1, 2, "FID"),
    ("kid", 1, 0, "KID"),
    ("membership_auc_digits", 1, 2, "AUC, digits"),
    ("membership_auc_strangers", 1, 2, "AUC, strangers"),
)
COLORS = {
    "naive_deletion": "tab:grey",
    "neggrad": "tab:brown",
    "siss": "tab:blue",
    "siss_no_is": "tab:cyan",
    "subscore_bernoulli": "tab:purple",
    "erasediff": "tab:orange",
    "retrack": "tab:green",
    "redirect": "tab:red",
}

REFERENCES = {"base": "X", "retrained": "*"}
# Longer stages in the plot.
BUDGETS = {
    "twice": ("D", "the paper's budget"),
    "four_times": ("^", "twice the paper's"),
    "six_times": ("v", "three times the paper's"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="The results.jsonl of run.py.")
    parser.add_argument("--readme", type=Path, nargs="+", default=[], help="Files whose tables are replaced.")
    return parser.parse_args(argv)


def read_lines(file: Path) -> dict[str, Line]:
    """The last line of each task, of the base that the last line is of."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["key"]: line for line in lines if line["base"] == lines[-1]["base"]}


def of_stage(lines: dict[str, Line], stage: str, variant: str | None = None) -> list[Line]:
    return [line for line in lines.values() if line["stage"] == stage and variant in (None, line["variant"])]


def values(lines: Iterable[Line], key: str, factor: float = 1) -> list[float]:
    return [factor * line[key] for line in lines if line.get(key) is not None]


def spread(lines: list[Line], key: str, factor: float, digits: int) -> str:
    """Mean and range over seeds."""
    found = values(lines, key, factor)
    if not found:
        return "-"
    text = f"{np.mean(found):.{digits}f}"
    return text + (f" [{min(found):.{digits}f}, {max(found):.{digits}f}]" if len(found) > 1 else "")


def copies(lines: list[Line]) -> str:
    """Of all samples of all seeds together, with Wilson's 95 % interval."""
    trials = sum(line["samples"] for line in lines)
    hits = round(sum(line["copy_share"] * line["samples"] for line in lines))
    low, high = wilson_interval(hits, trials)
    return f"{100 * hits / trials:.3f} [{100 * low:.3f}, {100 * high:.3f}]"


def reference_rows(lines: dict[str, Line]) -> list[tuple[str, str, list[Line]]]:
    """Name, setting and lines of the seeds."""
    rows = [("base", "", of_stage(lines, "base")), ("retrained", "without the garment", of_stage(lines, "retrained"))]
    return [row for row in rows if row[2]]


def final_rows(lines: dict[str, Line]) -> list[tuple[str, str, list[Line]]]:
    """The two references first, then every variant at its chosen setting."""
    rows = reference_rows(lines)
    for variant in SWEEP:
        found = of_stage(lines, "final", variant)
        if found:
            setting = describe(chosen_setting(lines, variant))
            rows.append((variant, setting, [line for line in found if line["setting"] == setting]))
    return [row for row in rows if row[2]]


def longer_rows(lines: dict[str, Line], stage: str) -> list[tuple[str, str, list[Line]]]:
    """The two references, then the settings of each variant: those of `settings.py` first."""
    rows, found = [], groups(lines, stage)
    for variant, settings in LONGER[stage][1].items():
        planned = [describe(flags) for flags in settings]
        others = [setting for name, setting in found if name == variant and setting not in planned]
        rows += [(variant, setting, found.get((variant, setting), [])) for setting in planned + others]
    return reference_rows(lines) + [row for row in rows if row[2]]


def main_table(lines: dict[str, Line]) -> str:
    """The chosen settings in bold; and others that were run over seeds, those of an earlier choice, say."""
    head = ["", "setting", "seeds", "copies, %", *(label for *_, label in COLUMNS)]
    rows = []
    for name, chosen, chosen_lines in final_rows(lines):
        others = [(setting, found) for (variant, setting), found in groups(lines, "final").items() if variant == name]
        rows.append((name, f"**{chosen}**" if others else chosen, chosen_lines))
        rows += [(name, setting, found) for setting, found in others if setting != chosen and len(found) > 1]
    return table(
        head,
        (
            [name, setting, str(len(found)), copies(found), *(spread(found, *column[:3]) for column in COLUMNS)]
            for name, setting, found in rows
        ),
    )


def cost_table(lines: dict[str, Line]) -> str:
    rows = []
    for variant in SWEEP:
        for line in of_stage(lines, "cost", variant):
            peak = "-" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e6:.0f}"
            cells = [str(line["steps"]), str(line["network_evaluations"]), f"{line['train_seconds']:.1f}", peak]
            rows.append([variant, line["setting"], *cells])
    return table(["", "setting", "steps", "network evaluations", "seconds", "peak MB"], rows)


def sweep_table(lines: dict[str, Line]) -> str:
    rows = []
    for variant, settings in SWEEP.items():
        found = {line["setting"]: line for line in of_stage(lines, "sweep", variant)}
        chosen = describe(chosen_setting(lines, variant)) if found else None
        for setting in map(describe, settings):
            if setting in found:
                cells = [spread([found[setting]], *column[:3]) for column in COLUMNS]
                mark = "yes" if forgotten(found[setting]) else ""
                name = f"**{setting}**" if setting == chosen else setting
                rows.append([variant, name, f"{100 * found[setting]['copy_share']:.2f}", *cells, mark])
    return table(["", "setting", "copies, %", *(label for *_, label in COLUMNS), "forgotten"], rows)


def groups(lines: dict[str, Line], stage: str) -> dict[tuple[str, str], list[Line]]:
    """The seeds of each variant and setting of a stage."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in of_stage(lines, stage):
        found.setdefault((line["variant"], line["setting"]), []).append(line)
    return found


def grouped_table(lines: dict[str, Line], stage: str) -> str:
    recommended = {"twice": describe(RECOMMENDED), "six_times": describe(THOROUGH)}.get(stage)
    if stage in LONGER:
        rows = longer_rows(lines, stage)
    else:
        rows = [(variant, setting, found) for (variant, setting), found in groups(lines, stage).items()]
    return table(
        ["", "setting", "seeds", "copies, %", *(label for *_, label in COLUMNS), "active share"],
        (
            [
                variant,
                f"**{setting}**" if variant == "siss" and setting == recommended else setting,
                *(str(len(found)), copies(found)),
                *(spread(found, *column[:3]) for column in COLUMNS),
                spread(found, "forget_active", 1, 2),
            ]
            for variant, setting, found in rows
        ),
    )


def summary_table(lines: dict[str, Line]) -> str:
    """Means only, for benchmarks/README.md: each method by itself with the paper's budget and averaged weights."""
    rows = reference_rows(lines)
    found = groups(lines, "twice")
    for variant, settings in LONGER["twice"][1].items():
        setting = next(describe(flags) for flags in settings if "--use_ema" in flags)
        if variant in COMPARED and (variant, setting) in found:
            name = f"**`{variant}`**" if variant == "siss" else f"`{variant}`"
            rows.append((name, setting, found[variant, setting]))
    return table(
        ["", "seeds", "copies", "NLL of the garment", "inception score", "FID", "recognised among strangers (AUC)"],
        (
            [
                name,
                str(len(found)),
                f"{np.mean(values(found, 'copy_share', 100)):.2f} %",
                *(
                    f"{np.mean(values(found, key)):.{digits}f}"
                    for key, digits in (
                        ("nll_forget_bpd", 1),
                        ("inception_score", 2),
                        ("fid", 1),
                        ("membership_auc_strangers", 2),
                    )
                ),
            ]
            for name, _, found in rows
        ),
    )


def error_bars(axis: plt.Axes, found: list[Line], x: str, y: str, factor: float, **style: object) -> None:
    """The mean over seeds, the bars from the least to the greatest."""
    points = np.array([(factor * line[x], line[y]) for line in found if line[x] is not None and line[y] is not None])
    if len(points):
        mean = points.mean(0)
        bars = np.abs(np.stack([points.min(0), points.max(0)]) - mean)
        axis.errorbar(*mean, xerr=bars[:, :1], yerr=bars[:, 1:], capsize=2, markersize=7, **style)


def plot_pareto(path: Path, lines: dict[str, Line]) -> None:
    """Forgetting against quality: chosen settings over seeds, the sweep behind them in the same colour."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5), layout="constrained")
    panels = (
        ("copy_share", 100, "copies of the garment, % of samples", "fid", "FID"),
        ("injected_copy_share", 100, "garment restored from 60 % noise, % of draws", "fid", "FID"),
        ("nll_forget_bpd", 1, "NLL of the garment, bits/dim", "inception_score", "inception score"),
    )
    for axis, (x, factor, x_label, y, y_label) in zip(axes, panels):
        for variant in SWEEP:
            calibrated, color = "calibrated" in variant, COLORS[variant.split(",")[0]]
            swept = [line for line in of_stage(lines, "sweep", variant) if line[y] is not None]
            marker, fill = ("s", "none") if calibrated else ("o", color)
            dots = {"marker": marker, "s": 10, "alpha": 0.35, "edgecolors": color, "facecolors": fill}
            axis.scatter(values(swept, x, factor), values(swept, y), **dots)
        for name, _, found in final_rows(lines):
            if name in REFERENCES:
                style = {"color": "black", "fmt": REFERENCES[name]}
            else:
                calibrated, color = "calibrated" in name, COLORS[name.split(",")[0]]
                fill = "white" if calibrated else color
                style = {"color": color, "fmt": "s" if calibrated else "o", "markerfacecolor": fill}
            error_bars(axis, found, x, y, factor, zorder=3, **style)
        for stage, (marker, _) in BUDGETS.items():
            for variant, _, found in longer_rows(lines, stage):
                # Averaged weights are what all methods have in common here; bars take two seeds.
                if "--use_ema" in found[0].get("flags", ()) and len(found) > 1:
                    color = COLORS[variant.split(",")[0]]
                    fill = "white" if "calibrated" in variant else color
                    style = {"color": color, "fmt": marker, "markerfacecolor": fill}
                    error_bars(axis, found, x, y, factor, zorder=4, **style)
        if factor == 100:
            axis.set_xscale("symlog", linthresh=0.1)
            axis.set_xlim(left=-0.01)
        axis.set(xlabel=x_label, ylabel=y_label)
        if x == "nll_forget_bpd":
            axis.set_xlim(2, 10)
        limit(axis, [value for *_, found in final_rows(lines) for value in values(found, y)], y)
    # By colour and by shape: a setting has its name in the tables.
    marks = [(marker, "black", name) for name, marker in REFERENCES.items()]
    marks += [("o", color, method) for method, color in COLORS.items()]
    marks += [
        ("o", "dimgrey", "half of the paper's budget: the sweep's choice"),
        ("s", "white", "the same, calibrated"),
    ]
    marks += [(marker, "dimgrey", label) for marker, label in BUDGETS.values()]
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            markerfacecolor=fill,
            color="dimgrey" if fill == "white" else fill,
            label=label,
        )
        for marker, fill, label in marks
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def limit(axis: plt.Axes, found: list[float], y: str) -> None:
    """Cut off what has fallen apart: the comparison is among those that have not."""
    if found and y == "fid":
        axis.set_ylim(0, 1.15 * float(np.quantile(found, 0.9)))
    elif found:
        axis.set_ylim(float(np.quantile(found, 0.1)) - 0.3, max(found) + 0.1)


def plot_calibration(path: Path, lines: dict[str, Line]) -> None:
    """The sweep of each subtracting method, with calibrated forgetting and without."""
    methods = [variant for variant in SWEEP if f"{variant}, calibrated" in SWEEP]
    figure, axes = plt.subplots(1, len(methods), figsize=(4 * len(methods), 4.2), sharey=True, layout="constrained")
    retrained = values(of_stage(lines, "retrained"), "fid")
    for axis, method in zip(axes, methods):
        for variant, marker in ((method, "o"), (f"{method}, calibrated", "s")):
            swept = [line for line in of_stage(lines, "sweep", variant) if line["fid"] is not None]
            label = "calibrated" if "calibrated" in variant else "not calibrated"
            x = values(swept, "injected_copy_share", 100)
            axis.plot(x, values(swept, "fid"), marker, alpha=0.7, label=label)
        if retrained:
            axis.axhspan(min(retrained), max(retrained), color="black", alpha=0.15, label="retrained, its seeds")
        axis.set_xscale("symlog", linthresh=0.4)
        axis.set(title=method, xlabel="garment restored, % of draws", xlim=(-0.1, 110))
        axis.set_yscale("log")
    axes[0].set_ylabel("FID")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


TABLES: dict[str, Callable[[dict[str, Line]], str]] = {
    "summary": summary_table,
    "main": main_table,
    "cost": cost_table,
    **{stage: partial(grouped_table, stage=stage) for stage in (*LONGER, "ablation", "ten_times")},
    "sweep": sweep_table,
}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lines = read_lines(args.results)
    tables = {name: make(lines) for name, make in TABLES.items()}
    for name, content in tables.items():
        print(f"{name}\n\n{content}\n")
    replace_tables(args.readme, tables)
    plot_pareto(args.results.with_name("pareto.png"), lines)
    plot_calibration(args.results.with_name("calibration.png"), lines)


if __name__ == "__main__":
    main()

"""Tables of the study: `python benchmarks/reliability/failures.py results.jsonl [--readme README.md] [--pictures DIR]`.

With `--readme` each table replaces what is between its two marks there. With `--pictures`, the folder that the study wrote
its pictures to, that of the worst run of each method is copied beside the results.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from problems import PROBLEMS
from study import RATES, picture_name
from tables import replace_tables, table
from variants import VARIANTS

from siss_diffusers.metrics.copies import wilson_interval


Line = dict[str, Any]
MAX_COPIES = 0.01
SHARPNESS = (0.8, 1.25)  # of the pictures that the base draws beside its copies
MAX_ACCURACY_LOSS = 0.02
MAX_SCORE_LOSS = 0.03


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, nargs="+", default=[], help="Files whose tables are replaced.")
    parser.add_argument("--pictures", type=Path, help="The folder of the pictures of all runs.")
    return parser.parse_args(argv)


def faults(line: Line, base: Line) -> list[str]:
    """Return why a run failed; none for one that did what was asked."""
    if line.get("failed"):
        return ["broke off"]
    found = []
    if line["copy_share"] is None or line["copy_share"] > MAX_COPIES:
        found.append("copies")
    if line.get("broken_share"):
        found.append("broken pictures")
    if "others_sharpness" in line:
        sharpness = line["others_sharpness"]
        if sharpness is None or not SHARPNESS[0] <= sharpness / base["others_sharpness"] <= SHARPNESS[1]:
            found.append("sharpness")
    if "classifier_accuracy" in line:
        accuracy = line["classifier_accuracy"]
        if accuracy is None or accuracy < base["classifier_accuracy"] - MAX_ACCURACY_LOSS:
            found.append("digits")
    if "inception_score" in line:
        score = line["inception_score"]
        if score is None or score < (1 - MAX_SCORE_LOSS) * base["inception_score"]:
            found.append("inception score")
    return found


def badness(line: Line, base: Line) -> tuple[int, float]:
    """Order runs: those that failed in more ways come later, and those with more copies."""
    return len(faults(line, base)), line.get("copy_share") or 0.0


class Study:
    """The lines of a study.

    Args:
        lines: as the study wrote them; of two with one key the later counts.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        by_key = {line["key"]: line for line in lines}
        self.lines = list(by_key.values())
        self.bases = {line["problem"]: line for line in self.lines if line["stage"] == "base"}
        self.problems = [name for name in PROBLEMS if name in self.bases]

    @classmethod
    def read(cls, file: Path) -> "Study":
        return cls(map(json.loads, file.read_text().splitlines()))

    def of(self, stage: str, problem: str, variant: str, factor: float = 1) -> list[Line]:
        """Return the runs of a setting."""
        return [
            line
            for line in self.lines
            if (line["stage"], line["problem"], line["variant"]) == (stage, problem, variant)
            and math.isclose(line["rate_factor"], factor)
        ]

    def failures(self, lines: Sequence[Line]) -> str:
        """Say how many of these runs of one problem failed, with Wilson's interval, and why."""
        if not lines:
            return ""
        why = [faults(line, self.bases[line["problem"]]) for line in lines]
        failed = sum(map(bool, why))
        low, high = wilson_interval(failed, len(lines))
        reasons = sorted({reason for found in why for reason in found})
        listed = ", ".join(f"{reason} {sum(reason in found for found in why)}" for reason in reasons)
        share = f"{failed} of {len(lines)} [{100 * low:.0f}, {100 * high:.0f}] %"
        return share + (f": {listed}" if listed else "")


def spread(lines: Sequence[Line], key: str, factor: float, digits: int) -> str:
    """Return mean and range of `factor` times a figure."""
    values = [factor * line[key] for line in lines if line.get(key) is not None]
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def failures_table(study: Study, stage: str = "study") -> str:
    rows = [
        [name, *(study.failures(study.of(stage, problem, name)) for problem in study.problems)] for name in VARIANTS
    ]
    return table(["", *study.problems], [row for row in rows if any(row[1:])])


# Key, factor, digits, what it is called; and whether it is told relative to the base.
FIGURES = (
    ("copy_share", 100, 1, "copies, %", False),
    ("others_sharpness", 1, 2, "sharpness / base", True),
    ("others_brightness", 1, 2, "brightness / base", True),
    ("classifier_accuracy", 100, 1, "digits right, %", False),
    ("drift", 1, 2, "drift of digits", False),
    ("temple_drift", 1, 2, "drift of temples", False),
    ("nll_forget_bpd", 1, 2, "NLL garment", False),
    ("nll_keep_bpd", 1, 2, "NLL digits", False),
    ("inception_score", 1, 2, "inception score", False),
    ("fid", 1, 1, "FID", False),
    ("membership_auc_strangers", 1, 2, "AUC, strangers", False),
)


def figures_table(study: Study, problem: str, stage: str = "study") -> str:
    base = study.bases[problem]
    columns = [column for column in FIGURES if column[0] in base]

    def cells(lines: Sequence[Line]) -> list[str]:
        return [
            spread(lines, key, factor / (base[key] if relative else 1), digits)
            for key, factor, digits, _, relative in columns
        ]

    rows = [["base", "", *cells([base])]]
    for name in VARIANTS:
        if lines := study.of(stage, problem, name):
            rows.append([name, str(len(lines)), *cells(lines)])
    return table(["", "seeds", *(column[3] for column in columns)], rows)


def rates_table(study: Study) -> str:
    rows = []
    for problem in study.problems:
        for name in VARIANTS:
            cells = []
            for factor in RATES:
                lines = study.of("rates", problem, name, factor)
                failed = sum(bool(faults(line, study.bases[problem])) for line in lines)
                cells.append(f"{failed} of {len(lines)}, {spread(lines, 'copy_share', 100, 0)} %" if lines else "")
            if any(cells):
                rows.append([problem, name, *cells])
    return table(["", "", *(f"x {factor:.2g}" for factor in RATES)], rows)


def copy_pictures(study: Study, pictures: Path, folder: Path) -> None:
    """Copy the picture of the worst run of each variant on each problem, and that of the base."""
    folder.mkdir(exist_ok=True)
    for problem in study.problems:
        runs = {name: lines for name in VARIANTS if (lines := study.of("study", problem, name))}
        if runs:
            shutil.copy(pictures / picture_name(f"base/{problem}"), folder)
        for name, lines in runs.items():
            worst = max(lines, key=lambda line: badness(line, study.bases[line["problem"]]))
            if not worst.get("failed"):
                shutil.copy(pictures / picture_name(worst["key"]), folder / picture_name(f"{problem}/{name}"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = Study.read(args.results)
    tables = {
        "failures": failures_table(study),
        "long": failures_table(study, "long"),
        "rates": rates_table(study),
        **{problem: figures_table(study, problem) for problem in study.problems},
        **{f"{problem} long": figures_table(study, problem, "long") for problem in study.problems},
    }
    for name, content in tables.items():
        print(f"{name}\n\n{content}\n")
    replace_tables(args.readme, tables)
    if args.pictures is not None:
        copy_pictures(study, args.pictures, args.results.with_name("pictures"))


if __name__ == "__main__":
    main()

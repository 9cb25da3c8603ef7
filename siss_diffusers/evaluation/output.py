"""The files of an evaluation: figures for programs, pictures and a report for people."""

from pathlib import Path

from siss_diffusers.evaluation.evaluator import Evaluation
from siss_diffusers.metrics.pictures import save_grid
from siss_diffusers.report import write_report
from siss_diffusers.storage.files import write_json


GRID_COLUMNS, GRID_SAMPLES = 16, 64
MIN_TILE = 64  # side of a sample in the grid, in pixels


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write `evaluation.json`, the pictures and `report.html` into a folder, and return the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", evaluation.content)
    report = folder / "report.html"
    write_report(report, evaluation.content, draw_pictures(folder, evaluation))
    return report


def draw_pictures(folder: Path, evaluation: Evaluation) -> dict[str, Path]:
    """Write grids of samples of the same seeds, copies framed, and return the files by caption."""
    pictures = {}
    for name, kinds in evaluation.samples.items():
        for kind, samples in kinds.items():
            shown = samples[:GRID_SAMPLES]
            copies = evaluation.detectors.flags(shown)["any"].tolist()
            file = folder / f"{name}_{kind.replace(' ', '_')}.png"
            scale = max(MIN_TILE // shown.shape[-1], 1)
            save_grid(file, shown, copies, columns=min(GRID_COLUMNS, len(shown)), scale=scale)
            pictures[f"{name}, {kind}"] = file
    return pictures

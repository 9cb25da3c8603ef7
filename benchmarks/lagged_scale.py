"""What `--forget_scale_every K` does to forgetting and to quality: `python benchmarks/lagged_scale.py`.

Each run is a training of the demo of digits at t >= 300, or that of `make demo` (text), with another seed and K, from 1,
the exact rule, to more than the run has steps: the scale of its first step throughout. All are measured on the same
sampling seeds, which are not the demos'. A run that is on disk is not repeated, so an interrupted study goes on; two
processes may each take a model. Writes `results.json` and `table.md`.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
from calibrated_forgetting import SAMPLING_SEED, SETTINGS, describe, measure


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import demo_sd
import demo_unconditional
from launching import launch

from siss_diffusers import evaluation
from siss_diffusers.assets import captioned, digits
from siss_diffusers.storage.files import write_json


COLUMNS = {
    "digits": {"copy_share": (100, "copies, %"), "inception_score": (1, "inception score")},
    "text": {
        "copy_share": (100, "copies, %"),
        "others_distance_to_keep": (1, "L2 of the others"),
        "classifier_accuracy": (100, "digits right, %"),
    },
}
STEPS = {"digits": 300, "text": 100}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lagged_scale"))
    parser.add_argument("--models", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10, 1000], help="--forget_scale_every, K.")
    parser.add_argument("--num_samples", type=int, default=2048, help="Samples of digits.")
    parser.add_argument("--num_forget_samples", type=int, default=128, help="Samples of the memorized prompt.")
    parser.add_argument("--num_digit_samples", type=int, default=100, help="Samples of the ten digit prompts.")
    return parser.parse_args()


def digits_flags(data: Path) -> dict[str, str | list[str]]:
    # Those that the table in README.md was made with; the demo has taken others since.
    return {
        "--method": "siss",
        "--forget_scaling": "relative",
        "--forget_scale": "1",
        "--calibrate_forgetting": "0.9",
        "--timestep_range": ["300", "1000"],
        "--train_batch_size": "64",
        "--learning_rate": "2.5e-5",
        "--pretrained_model_name_or_path": str(demo_unconditional.MODEL),
        "--train_data_dir": str(data),
        "--forget_files": "garment_00.png",
    }


def text_flags(data: Path) -> dict[str, str | list[str] | None]:
    return SETTINGS | {
        "--pretrained_model_name_or_path": str(demo_sd.MODEL),
        "--train_data_dir": str(data),
        "--use_lora": None,
    }


def digits_evaluator(args: argparse.Namespace) -> evaluation.Evaluator:
    return demo_unconditional.make_evaluator(SAMPLING_SEED, args.num_samples, num_keep_images=0)


def text_evaluator(args: argparse.Namespace) -> evaluation.Evaluator:
    return demo_sd.make_evaluator(SAMPLING_SEED, args.num_forget_samples, args.num_digit_samples)


def measure_digits(evaluator: evaluation.Evaluator, folder: Path) -> dict:
    model = evaluator.model("the run", demo_unconditional.load_pipeline(folder))
    return evaluation.measure(model, demo_unconditional.CURVE_METRICS)[0]


def run_all(args: argparse.Namespace, model: str) -> None:
    flags_of, make_evaluator, write_data, measure_run = {
        "digits": (digits_flags, digits_evaluator, digits.write_training_folder, measure_digits),
        "text": (text_flags, text_evaluator, captioned.write_training_folder, measure),
    }[model]
    evaluator, data = make_evaluator(args), args.output_dir / f"{model}-data"
    if not data.exists():
        write_data(data)
    for seed, every in product(args.seeds, args.every):
        file = args.output_dir / "runs" / f"{model}-every-{every}-seed-{seed}.json"
        if file.exists():
            continue
        folder = args.output_dir / "training" / file.stem
        flags = flags_of(data) | {
            "--output_dir": str(folder),
            "--overwrite_output_dir": None,
            "--cache_dir": str(args.output_dir / "cache" / file.stem),
            "--report_to": "none",
            "--seed": str(seed),
            "--max_train_steps": str(STEPS[model]),
            "--forget_scale_every": str(every),
        }
        seconds = launch("train_siss_unconditional.py" if model == "digits" else "train_siss_sd.py", flags)
        log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        figures = measure_run(evaluator, folder)
        result = {name: figures[name] for name in COLUMNS[model]}
        result |= {"forget_active": float(np.mean([line["forget_active"] for line in log[-10:]]))}
        step_seconds = float(np.median([line["step_seconds"] for line in log]))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            file,
            {"model": model, "every": every, "seed": seed, "seconds": seconds, "step_seconds": step_seconds} | result,
        )


def table(results: list[dict]) -> str:
    lines = []
    for model, columns in COLUMNS.items():
        found = [result for result in results if result["model"] == model]
        if not found:
            continue
        shown = columns | {"forget_active": (1, "active share"), "step_seconds": (1, "seconds a step")}
        lines += [f"| {model}: K | seeds | {' | '.join(label for _, label in shown.values())} |"]
        lines += ["|---|---|" + "---|" * len(shown)]
        for every in sorted({result["every"] for result in found}):
            rows = [result for result in found if result["every"] == every]
            cells = [describe([row[name] for row in rows], factor) for name, (factor, _) in shown.items()]
            lines.append(f"| {every} | {len(rows)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    for model in args.models:
        run_all(args, model)
    # Of everything that is there, whatever this call was asked for.
    results = [json.loads(file.read_text()) for file in sorted((args.output_dir / "runs").glob("*.json"))]
    write_json(args.output_dir / "results.json", {"runs": results})
    (args.output_dir / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()

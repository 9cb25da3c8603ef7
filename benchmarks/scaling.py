"""Start-up time, memory and speed of train_siss_unconditional.py as its inputs grow: `python benchmarks/scaling.py`.

Each row of a table is a real process (or two) on the shipped tiny model. What is measured, and how, is in
benchmarks/README.md.
"""

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from step_cost import describe_machine

import siss_diffusers
from siss_diffusers.assets.digits import digit_images


ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
PARQUET_ROWS = 10_000
POLL_SECONDS = 0.01
WARMUP = 2  # steps, for the seconds of a step
BATCHES, ACCUMULATIONS, FORGET_IMAGES, PROCESSES = (1, 4, 16, 64), (1, 4, 16), (1, 10, 100, 1_000), (1, 2)
COLUMNS = {
    "images": (
        *("first_start_seconds", "conversion_seconds", "start_seconds", "above_smallest_seconds"),
        *("first_start_processor_seconds", "start_processor_seconds", "seconds_per_step"),
    ),
    "batch": ("steps_per_second", "pairs_per_second"),
    "accumulation": ("steps_per_second", "pairs_per_second"),
    "forget": ("start_seconds", "steps_per_second"),
    "processes": ("steps_per_second", "pairs_per_second"),
}


@dataclass(frozen=True)
class Setting:
    """One run of the script.

    Args:
        images: of the training set, none of which is to forget.
        batch: pairs per process and micro-batch.
        accumulation: micro-batches per step.
        forget: images to forget.
        processes: on this machine.
    """

    images: int = 1_000
    batch: int = 4
    accumulation: int = 1
    forget: int = 1
    processes: int = 1


def pictures(start: int, stop: int) -> Iterator[bytes]:
    """8x8 digits, no two alike: the bytes of the number of each are added to its first pixels."""
    digits = digit_images()[0]
    for number in range(start, stop):
        pixels = digits[number % len(digits)].copy()
        pixels.reshape(-1)[:4] += np.frombuffer(struct.pack("<I", number), np.uint8)
        content = BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        yield content.getvalue()


def write_data_set(folder: Path, count: int) -> None:
    """A data set as the Hub has them: the pictures' bytes in a Parquet file."""
    folder.mkdir(parents=True)
    schema = datasets.Features(image=datasets.Image()).arrow_schema
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, count, PARQUET_ROWS):
            cells = [{"bytes": picture, "path": None} for picture in pictures(start, min(start + PARQUET_ROWS, count))]
            writer.write_table(pa.table([pa.array(cells, schema.field("image").type)], schema=schema))


def write_forget_images(folder: Path, count: int) -> None:
    """Pictures that are in no data set of `write_data_set`."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures(2**32 - count, 2**32)):
        (folder / f"{index:06d}.png").write_bytes(picture)


def anonymous_bytes(pid: int) -> int:
    """Resident memory that belongs to no file; 0 once the process has ended, and but on Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def processor_seconds(pid: int) -> float:
    """Used so far; 0 once the process has ended, and but on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_script(
    setting: Setting, steps: int, data: Path, forget: Path, cache: Path, flags: list[str]
) -> dict[str, float | None]:
    """
    Returns:
        `start_seconds` from the start of the process to that of its first step, `start_processor_seconds` to the end of
        that step (which other work on the machine delays less), `seconds_per_step` (median) and
        `peak_anonymous_bytes` of the biggest process. None for what only Linux tells.
    """
    with tempfile.TemporaryDirectory() as folder:
        output_dir, log = Path(folder, "out"), Path(folder, "log.txt")
        command = [sys.executable, str(ROOT / "train_siss_unconditional.py")]
        command += ["--pretrained_model_name_or_path", str(MODEL), "--dataset_name", str(data)]
        command += ["--forget_data_dir", str(forget), "--cache_dir", str(cache), "--output_dir", str(output_dir)]
        command += ["--train_batch_size", str(setting.batch), "--max_train_steps", str(steps), "--report_to", "none"]
        command += ["--gradient_accumulation_steps", str(setting.accumulation)]
        command += ["--method", "siss", *flags]  # which measures nothing before its first step
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if setting.processes > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
            env |= {"WORLD_SIZE": str(setting.processes), "LOCAL_WORLD_SIZE": str(setting.processes)}
        started, peak, first_line_after, processor = time.perf_counter(), 0, None, 0.0
        with log.open("w") as printed:
            running = []
            for rank in range(setting.processes):
                of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if setting.processes > 1 else {}
                running.append(subprocess.Popen(command, env=env | of_rank, stdout=printed, stderr=printed))
            train_log = output_dir / "train_log.jsonl"
            while any(process.poll() is None for process in running):
                peak = max(peak, *(anonymous_bytes(process.pid) for process in running))
                if first_line_after is None and train_log.exists() and train_log.stat().st_size:
                    first_line_after = time.perf_counter() - started
                    processor = max(processor_seconds(process.pid) for process in running)
                if any(process.poll() for process in running):  # the others would wait for it
                    for process in running:
                        process.terminate()
                time.sleep(POLL_SECONDS)
        if any(process.returncode for process in running):
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
        seconds = [json.loads(line)["step_seconds"] for line in train_log.read_text().splitlines()]
    return {
        "start_seconds": first_line_after - seconds[0],
        "start_processor_seconds": processor or None,
        "seconds_per_step": statistics.median(seconds[WARMUP:] or seconds),
        "peak_anonymous_bytes": peak or None,
    }


def measure(setting: Setting, args: argparse.Namespace, folder: Path) -> dict[str, float | None]:
    """A row of a table: a first run, whose start includes the conversion of the data set by `datasets`, and medians of
    `--repeats` more with the same cache."""
    data, forget = folder / f"data-{setting.images}", folder / f"forget-{setting.forget}"
    if not data.exists():
        write_data_set(data, setting.images)
    if not forget.exists():
        write_forget_images(forget, setting.forget)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first, *others = (
            run_script(setting, args.steps, data, forget, Path(cache), args.flags.split())
            for _ in range(1 + args.repeats)
        )
    row = {name: None if first[name] is None else statistics.median(run[name] for run in others) for name in first}
    pairs = setting.batch * setting.accumulation * setting.processes
    return vars(setting) | {
        "first_start_seconds": first["start_seconds"],
        "first_start_processor_seconds": first["start_processor_seconds"],
        "first_peak_anonymous_bytes": first["peak_anonymous_bytes"],
        "conversion_seconds": first["start_seconds"] - row["start_seconds"],
        **row,
        "steps_per_second": 1 / row["seconds_per_step"],
        "pairs_per_second": pairs / row["seconds_per_step"],
    }


def images_axis(args: argparse.Namespace) -> list[Setting]:
    return [Setting(images=count) for count in sorted(args.images)]


def batch_axis(args: argparse.Namespace) -> list[Setting]:
    return [Setting(batch=batch) for batch in BATCHES]


def accumulation_axis(args: argparse.Namespace) -> list[Setting]:
    return [Setting(accumulation=steps) for steps in ACCUMULATIONS]


def forget_axis(args: argparse.Namespace) -> list[Setting]:
    return [Setting(forget=count) for count in FORGET_IMAGES]


def processes_axis(args: argparse.Namespace) -> list[Setting]:
    """So many pairs for each: twice the work on two."""
    return [replace(Setting(batch=16), processes=count) for count in PROCESSES]


AXES: dict[str, Callable[[argparse.Namespace], list[Setting]]] = {
    "images": images_axis,
    "batch": batch_axis,
    "accumulation": accumulation_axis,
    "forget": forget_axis,
    "processes": processes_axis,
}


def measure_axis(axis: str, args: argparse.Namespace, folder: Path) -> list[dict[str, float | None]]:
    """The rows of a table, printed as they come."""
    columns = COLUMNS[axis]
    titles = [name.removesuffix("_seconds").replace("_", " ").replace("processor", "CPU") for name in columns]
    print(f"\n{axis:>12}" + "".join(f"{title:>17}" for title in titles) + f"{'peak MB':>9}", flush=True)
    rows = []
    for setting in AXES[axis](args):
        row = measure(setting, args, folder)
        if axis == "images":
            smallest = rows[0] if rows else row
            row["above_smallest_seconds"] = row["start_seconds"] - smallest["start_seconds"]
        rows.append(row)
        cells = [f"{'-':>17}" if row[name] is None else f"{row[name]:17.3f}" for name in columns]
        memory = "-" if row["peak_anonymous_bytes"] is None else f"{row['peak_anonymous_bytes'] / 1e6:.0f}"
        print(f"{row[axis]:12}" + "".join(cells) + f"{memory:>9}", flush=True)
    return rows


def draw(results: dict[str, list[dict]], file: str) -> None:
    """Time or speed above, memory below, against each axis."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, len(results), figsize=(3.2 * len(results), 5), sharex="col", squeeze=False, layout="constrained"
    )
    for (above, below), (axis, rows) in zip(panels.T, results.items()):
        values = [row[axis] for row in rows]
        lines = {"steps_per_second": "steps/s"}
        if axis == "images":
            lines = {"first_start_seconds": "first run: s to the first step", "start_seconds": "later runs"}
        for name, label in lines.items():
            above.plot(values, [row[name] for row in rows], "o-", label=label)
        below.plot(values, [(row["peak_anonymous_bytes"] or 0) / 1e6 for row in rows], "o-", label="peak MB")
        for panel in (above, below):
            panel.set_xscale("log")
            panel.set_ylim(0, 1.2 * max(max(line.get_ydata()) for line in panel.lines))
            panel.legend()
        below.set_xlabel({"batch": "pairs", "forget": "images to forget"}.get(axis, axis))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--axis", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=f"{', '.join(AXES)}; default: all."
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[100, 10_000, 1_000_000],
        help="Sizes of the training set. Default: 100 10000 1000000; the last takes 0.3 GB of temporary files.",
    )
    parser.add_argument("--steps", type=int, default=12, help="Of each run. Default: 12.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of a setting after the first one. Default: 3.")
    parser.add_argument(
        "--flags", default="", help="More flags of the script, in one word: --flags=--no-drop_near_duplicates"
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the results there.")
    parser.add_argument("--plot", type=str, metavar="FILE.png", help="Draw them there; needs matplotlib.")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.repeats < 1 or min(args.images) < 1:
        parser.error("--steps, --repeats and --images must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine = describe_machine(torch.device("cpu")) | {"threads": 1}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    with tempfile.TemporaryDirectory() as folder:
        results = {axis: measure_axis(axis, args, Path(folder)) for axis in dict.fromkeys(args.axis)}
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()

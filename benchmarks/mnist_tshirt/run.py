"""The MNIST T-Shirt experiment of the SISS paper with all seven methods side by side, at a size of one's choice:

    python benchmarks/mnist_tshirt/run.py --data mnist.npz --resolution 16 --num_workers 2

Trains the base (digits with 1 % of one garment picture) and the references (the same without it, from scratch), sweeps
every method over its own knobs at one budget of network evaluations, repeats the setting chosen by one rule for all over
seeds, and takes the recommended settings apart. Each result is a line of `results.jsonl` as soon as it is there: what is
there is not done again, so an interrupted run goes on, and any number of processes may work at it. `report.py` makes
the tables and plots.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Measurement
from problem import (
    PRESETS,
    Problem,
    load_classifier,
    prepare,
    pretrain,
    read_dataset,
    read_npz,
    train_classifier,
)
from settings import (
    ABLATION,
    LONGER,
    RECOMMENDED,
    RECOMMENDED_BUDGET,
    SWEEP,
    TEN_TIMES,
    TWO_ROWS,
    Setting,
    changed,
    describe,
    forget_ranges,
)
from step_cost import FREE_AT_ONCE, measure_peak
from tasks import Results, Task, lock, spawn, work

import train_siss_unconditional
from siss_diffusers import METHODS, Query, Rows
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS
from siss_diffusers.errors import UsageError
from siss_diffusers.hub.contents import weights_digest
from siss_diffusers.methods import SISS
from siss_diffusers.metrics.pictures import save_grid
from siss_diffusers.parsing import positive_int
from siss_diffusers.process import run


STAGES = ("base", "sweep", "final", "retrained", *LONGER, "ablation", "ten_times", "cost")
SWEEP_SEED = 100  # not one of those that the chosen settings are judged by
PICTURES = 160
# Under the rule `norm` rows that serve both sides run twice, and on these pictures about half of SISS's rows do.
FORGET_FIRST = 1.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Digits: an .npz file with x, (N, 28, 28) uint8, and y, (N,).")
    parser.add_argument(
        "--dataset_name", help="Digits on the Hub instead: ylecun/mnist, or claserken/mnist-with-tshirt, the paper's."
    )
    parser.add_argument(
        "--resolution",
        type=int,
        choices=list(PRESETS),
        default=16,
        help="16: a small network, for a CPU; 28: the paper's, for a GPU. Default: 16.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mnist_tshirt"))
    parser.add_argument("--results", type=Path, help="Default: results.jsonl in the folder of the resolution.")
    parser.add_argument("--base", type=Path, help="A base trained earlier, a pipeline, instead of training one.")
    parser.add_argument("--pretrain_steps", type=positive_int, help="Default: 12,000, and the paper's 117,500 at 28.")
    parser.add_argument(
        "--evaluations", type=positive_int, help="Budget: rows run in training; default: 9,600; 19,200."
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="Default: all.")
    parser.add_argument("--variants", nargs="+", choices=list(SWEEP), default=list(SWEEP), help="Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--retrained_seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--ablation_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=positive_int, default=10_000, help="Default: 10,000.")
    parser.add_argument("--num_sweep_samples", type=positive_int, default=1_024, help="Default: 1,024.")
    parser.add_argument("--num_ablation_samples", type=positive_int, default=2_048, help="Default: 2,048.")
    parser.add_argument("--num_workers", type=positive_int, default=1, help="Processes, spread over the GPUs.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cost_of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    preset = PRESETS[args.resolution]
    args.pretrain_steps = args.pretrain_steps or preset.pretrain_steps
    args.evaluations = args.evaluations or preset.evaluations
    args.folder = args.output_dir / f"{args.resolution}x{args.resolution}"
    args.results = args.results or args.folder / "results.jsonl"
    return args


def count_steps(flags: Setting, evaluations: int, pairs: int) -> int:
    """How many steps the budget pays for, the thresholds of calibrated forgetting included."""
    if flags["--method"] == "redirect":
        kinds = 1 if flags.get("--threshold_source") == "keep" else 2  # whose losses are measured
        evaluations -= kinds * NUM_BINS * DRAWS_PER_BIN
    elif "--calibrate_forgetting" in flags:
        evaluations -= NUM_BINS * DRAWS_PER_BIN
    rows = float(flags.get("--train_batch_size", pairs))
    if flags["--method"] in TWO_ROWS:
        # Outside of the range of forgetting a pair is one row.
        low, high = map(int, flags["--timestep_range"].split())
        ranges = forget_ranges(flags)
        rows *= 1 + sum(to - start for start, to in ranges) / len(ranges) / (high - low)
    if flags["--method"] == "siss" and flags.get("--forget_scaling") == "norm":
        rows *= FORGET_FIRST
    return max(int(evaluations / rows), 1)


@contextmanager
def counted_evaluations() -> Iterator[list[int]]:
    """How many rows any UNet was run on."""
    count = [0]

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if type(module).__name__ == "UNet2DModel":
            count[0] += len(inputs[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


@dataclass(frozen=True)
class IndependentSISS(SISS):
    """SISS as published, for the ablation: each pair by itself is made from its forget image with probability `lam`."""

    name = "siss_independent"

    def rows(self, query: Query) -> Rows:
        # By what was drawn for the pairs, so that a run of the same seed is the same.
        seed = int.from_bytes(hashlib.sha256(query.noise.numpy().tobytes()).digest()[:7], "big")
        uniform = torch.rand(len(query.noise), generator=torch.Generator().manual_seed(seed))
        return super().rows(replace(query, from_forget=uniform < self.lam))


def unlearn(problem: Problem, base: Path, output_dir: Path, flags: Setting, steps: int, seed: int) -> dict:
    """`train_siss_unconditional.py` in this process; what it took."""
    argv = [
        *("--pretrained_model_name_or_path", str(base), "--dataset_name", str(problem.training_set)),
        *("--output_dir", str(output_dir), "--overwrite_output_dir"),
        *("--max_train_steps", str(steps), "--checkpointing_steps", str(steps + 1), "--seed", str(seed)),
        *("--eval_batch_size", "128", "--report_to", "none", "--cache_dir", str(problem.folder / "cache")),
    ]
    for name, value in ({"--train_batch_size": str(problem.preset.pairs)} | flags).items():
        argv += [name, *value.split()]
    with counted_evaluations() as count:
        train_siss_unconditional.main(argv)
    log = [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]
    # Over the last ten steps, for a step sees few forget rows.
    active = [line["forget_active"] for line in log[-10:] if line.get("forget_active") is not None]
    return {
        "network_evaluations": count[0],
        "steps": steps,
        "step_seconds": statistics.median(line["step_seconds"] for line in log),
        "train_seconds": sum(line["step_seconds"] for line in log),
        "forget_active": float(np.mean(active)) if active else None,
        "forget_scale": statistics.median(line["forget_scale"] for line in log),
    }


class Experiment:
    """The tasks of each stage."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.problem = Problem.load(args.folder)
        self.base = args.base or args.folder / "base"
        self.results = Results(args.results, weights_digest(self.base))
        classifier = load_classifier(self.problem, device)
        self.measurement = Measurement(self.problem, classifier, self.problem.preset.num_inference_steps)

    def load(self, folder: Path) -> DDPMPipeline:
        pipeline = DDPMPipeline.from_pretrained(folder)
        pipeline.unet.to(self.device)
        return pipeline

    def tasks(self, stage: str) -> list[Task]:
        args = self.args
        if stage == "base":
            return [self.reference("base", self.base, seed) for seed in args.seeds]
        if stage == "retrained":
            # Another training each, not only other samples.
            return [self.reference("retrained", args.folder / f"retrained-{s}", s) for s in args.retrained_seeds]
        if stage == "sweep":
            return [
                self.unlearning("sweep", variant, flags, SWEEP_SEED, args.num_sweep_samples)
                for variant in args.variants
                for flags in SWEEP[variant]
            ]
        if stage in LONGER:
            factor, longer = LONGER[stage]
            return [
                self.unlearning(stage, variant, flags, seed, args.num_samples, factor * args.evaluations)
                for variant, settings in longer.items()
                if variant in args.variants
                for seed in args.seeds
                for flags in settings
            ]
        if stage == "ablation":
            changes = ABLATION if "siss" in args.variants else {}
            budget = RECOMMENDED_BUDGET * args.evaluations
            return [
                self.unlearning(
                    stage, f"siss: {name}", changed(RECOMMENDED, change), seed, args.num_ablation_samples, budget
                )
                for seed in args.ablation_seeds
                for name, change in changes.items()
            ]
        if stage == "ten_times":
            return [
                self.unlearning(stage, variant, flags, seed, args.num_ablation_samples, 10 * args.evaluations)
                for seed in args.ablation_seeds
                for variant, flags in TEN_TIMES.items()
                if variant in args.variants
            ]
        chosen = {variant: chosen_setting(self.results.read(), variant) for variant in args.variants}
        if stage == "final":
            return [
                self.unlearning("final", variant, flags, seed, args.num_samples)
                for seed in args.seeds
                for variant, flags in chosen.items()
            ]
        return [self.cost(variant, flags) for variant, flags in chosen.items()]

    def reference(self, variant: str, folder: Path, seed: int) -> Task:
        def do() -> dict:
            if not (folder / "pretraining.json").exists():
                pretrain(self.problem, folder, False, seed, self.args.pretrain_steps, self.device)
            return self.measured(folder, f"{variant}-{seed}", self.args.num_samples, seed)

        about = {"stage": variant, "variant": variant, "setting": "", "seed": seed, "samples": self.args.num_samples}
        return Task(f"{variant}/seed {seed}", about, do)

    def unlearning(
        self, stage: str, variant: str, flags: Setting, seed: int, num_samples: int, evaluations: int | None = None
    ) -> Task:
        evaluations = evaluations or self.args.evaluations
        key = f"{stage}/{variant}/{describe(flags)}/seed {seed}"

        def do() -> dict:
            folder = self.args.folder / "runs" / key.replace("/", "_").replace(" ", "-").replace(",", "")
            took = self.unlearn(folder, flags, evaluations, seed)
            measured = self.measured(folder, folder.name, num_samples, seed)
            shutil.rmtree(folder)
            return took | measured

        about = {"stage": stage, "variant": variant, "setting": describe(flags), "flags": flags, "seed": seed}
        return Task(key, about | {"evaluations": evaluations, "samples": num_samples}, do)

    def unlearn(self, folder: Path, flags: Setting, evaluations: int, seed: int) -> dict:
        steps = count_steps(flags, evaluations, self.problem.preset.pairs)
        return unlearn(self.problem, self.base, folder, flags, steps, seed)

    def measured(self, folder: Path, name: str, num_samples: int, seed: int) -> dict:
        pipeline = self.load(folder)
        images = self.measurement.samples(pipeline, num_samples, seed)
        shown = images[:PICTURES]
        (self.args.folder / "pictures").mkdir(exist_ok=True)
        copies = self.measurement.detectors.flags(shown)["any"].tolist()
        save_grid(self.args.folder / "pictures" / f"{name}.png", shown, copies, columns=20, scale=2)
        return self.measurement.of_samples(images) | self.measurement.of_network(pipeline)

    def cost(self, variant: str, flags: Setting) -> Task:
        """Seconds and peak memory in a process of its own."""

        def do() -> dict:
            child = [*sys.argv, "--cost_of", json.dumps(flags)]
            finished = subprocess.run(
                [sys.executable, *child],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | FREE_AT_ONCE,
            )
            return json.loads(finished.stdout.splitlines()[-1])

        about = {"stage": "cost", "variant": variant, "setting": describe(flags), "flags": flags}
        return Task(f"cost/{variant}/{describe(flags)}", about | {"evaluations": self.args.evaluations}, do)

    def measured_cost(self, flags: Setting) -> dict:
        took = {}

        def train(_: None) -> None:
            took.update(self.unlearn(self.args.folder / "runs" / "cost", flags, self.args.evaluations, 0))

        took["peak_bytes"] = measure_peak(lambda: train, [None], self.device)
        names = ("network_evaluations", "steps", "step_seconds", "train_seconds", "peak_bytes")
        return {name: took[name] for name in names}


def forgotten(line: dict) -> bool:
    """No copy among the samples, and 2 % at most among those that start from the noised garment."""
    return line["copy_share"] == 0 and line["injected_copy_share"] <= 0.02


def ruined(line: dict) -> bool:
    """No model of digits any more: the inception score, of ten classes, is below five."""
    return line["inception_score"] is None or line["inception_score"] < 5


def chosen_setting(found: dict[str, dict], variant: str) -> Setting:
    """The same rule for all: of the settings that forget, that with the lowest FID; if none does, that with the fewest
    copies among samples and among injections together. A ruined model is chosen only if there is no other."""
    lines = [line for line in found.values() if line["stage"] == "sweep" and line["variant"] == variant]
    if not lines:
        raise UsageError(f"--stages: {variant} has no results of the stage sweep yet; it comes first")

    def badness(line: dict) -> tuple:
        if ruined(line):
            return (2, line["copy_share"])
        return (0, line["fid"]) if forgotten(line) else (1, line["copy_share"] + line["injected_copy_share"])

    return min(lines, key=badness)["flags"]


def make_problem(args: argparse.Namespace, device: torch.device) -> None:
    """The images, the classifier and the base, each by one process while the others wait."""
    with lock(args.folder / "locks" / "problem", wait=True):
        if not (args.folder / "problem.json").exists():
            pictures, classes = read_npz(args.data) if args.data is not None else read_dataset(args.dataset_name)
            prepare(args.folder, args.resolution, pictures, classes)
        problem = Problem.load(args.folder)
        if not (args.folder / "classifier.safetensors").exists():
            accuracy = train_classifier(problem, args.folder / "classifier.safetensors")
            print(f"The classifier reads {100 * accuracy:.1f} % of the unseen digits right", flush=True)
        if args.base is None and not (args.folder / "base" / "pretraining.json").exists():
            pretrain(problem, args.folder / "base", True, 0, args.pretrain_steps, device)


def check(args: argparse.Namespace) -> None:
    prepared = (args.folder / "problem.json").exists()
    if not prepared and (args.data is None) == (args.dataset_name is None):
        raise UsageError("give the digits by --data or by --dataset_name, and only one of the two")
    if args.base is not None and not (args.base / "unet" / "diffusion_pytorch_model.safetensors").exists():
        raise UsageError(f"--base: {args.base} is no pipeline with a UNet in safetensors")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check(args)
    if args.num_workers > 1 and args.worker is None and args.cost_of is None:
        spawn(args.num_workers)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_problem(args, device)
    experiment = Experiment(args, device)
    if args.cost_of is not None:
        print(json.dumps(experiment.measured_cost(json.loads(args.cost_of))))
        return
    METHODS[IndependentSISS.name] = IndependentSISS
    for stage in args.stages:
        if stage == "cost" and args.worker:
            continue  # one at a time, or they would be in each other's way
        work(experiment.tasks(stage), experiment.results, args.folder / "locks")


if __name__ == "__main__":
    run(main, "run.py")

"""How often does unlearning fail? Every method at one setting, on five models, over training seeds:

    python benchmarks/reliability/study.py --data mnist.npz --num_workers 2

Each result is a line of `results.jsonl` as soon as it is there, and is not done again: interrupt the command and give it
once more. `failures.py` makes the tables.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from problems import PROBLEMS, Figures, StudyProblem
from tasks import Results, Task, lock, spawn, work
from variants import VARIANTS, Variant

from siss_diffusers import unlearn
from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.families import LoadedPipeline, find_family
from siss_diffusers.parsing import positive_int
from siss_diffusers.process import run
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings


STAGES = ("study", "rates", "long")
RATES = tuple(10 ** (-1 + 2 * index / 7) for index in range(8))  # times the default one, over two decades
LONG = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST digits for the T-Shirt problem, see benchmarks/mnist_tshirt.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reliability"))
    parser.add_argument("--results", type=Path, help="Default: results.jsonl in --output_dir.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="Default: all.")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="Default: all.")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)), help="Default: 0 to 19.")
    parser.add_argument("--num_samples", type=positive_int, default=256, help="Of text-to-image models. Default: 256.")
    parser.add_argument("--num_unconditional_samples", type=positive_int, default=2_048, help="Default: 2,048.")
    parser.add_argument("--num_workers", type=positive_int, default=1, help="Processes, spread over the GPUs.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.results = args.results or args.output_dir / "results.jsonl"
    return args


def picture_name(key: str) -> str:
    """Return the file name of the picture of a run."""
    return key.replace("/", "_").replace(" ", "-").replace(",", "") + ".png"


def make_problem(name: str, args: argparse.Namespace) -> StudyProblem:
    """Return a problem whose data are written, by one process while others wait."""
    num_samples = args.num_samples if name.startswith("sd") else args.num_unconditional_samples
    extra = {"data": args.data} if name == "tshirt" else {}
    with lock(args.output_dir / "locks" / name, wait=True):
        return PROBLEMS[name](args.output_dir / "problems", num_samples, **extra)


def default_rate(problem: StudyProblem) -> float:
    """Return the learning rate that a run has where none is given."""
    source = LoadedPipeline(problem.load())
    family = find_family(source)
    kind = TextToImageSettings if family.has_prompts else UnconditionalSettings
    return kind(**problem.settings).default_learning_rate(family.from_source(source).width(source))


def train(problem: StudyProblem, variant: Variant, seed: int, steps: int, changes: dict[str, Any]) -> Any:
    """Unlearn in one phase, or in several of so many steps; return the pipeline."""
    pipeline = problem.load()
    for phase, settings in enumerate(variant.phases):
        if phase and hasattr(pipeline, "unload_lora_weights"):
            # What was learned becomes part of the weights, and a new adapter begins.
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        settings = problem.settings | settings | changes
        arguments = problem.arguments()
        pipeline = unlearn(
            pipeline, **arguments, **settings, train_batch_size=problem.pairs, max_train_steps=steps, seed=seed
        ).pipeline
    return pipeline


def unlearning(
    stage: str, problem: StudyProblem, name: str, seed: int, pictures: Path, factor: float = 1, steps_factor: int = 1
) -> Task:
    """Return the task of one run: `factor` times the default learning rate, `steps_factor` times the steps."""
    variant = VARIANTS[name]
    steps = steps_factor * variant.steps(problem.budget, problem.pairs)
    key = f"{stage}/{problem.name}/{name}/seed {seed}" + (f"/rate x {factor:.3g}" if factor != 1 else "")

    def do() -> Figures:
        changes = {} if factor == 1 else {"learning_rate": factor * default_rate(problem)}
        started = time.perf_counter()
        try:
            pipeline = train(problem, variant, seed, steps, changes)
        except RunError as error:
            return {"failed": str(error), "train_seconds": time.perf_counter() - started}
        seconds = time.perf_counter() - started
        pictures.mkdir(parents=True, exist_ok=True)
        picture = pictures / picture_name(key)
        return problem.measure(pipeline, picture) | {"train_seconds": seconds}

    about = {"stage": stage, "problem": problem.name, "variant": name, "seed": seed, "steps": steps}
    return Task(key, about | {"rate_factor": factor, "num_samples": problem.num_samples}, do)


def base(problem: StudyProblem, pictures: Path) -> Task:
    """Return the task of measuring the base."""

    def do() -> Figures:
        pictures.mkdir(parents=True, exist_ok=True)
        return problem.measure(problem.load(), pictures / picture_name(f"base/{problem.name}"))

    about = {"stage": "base", "problem": problem.name, "variant": "base", "num_samples": problem.num_samples}
    return Task(f"base/{problem.name}", about, do)


def tasks(stage: str, problem: StudyProblem, seeds: list[int], variants: list[str], pictures: Path) -> list[Task]:
    """Return the tasks of a stage on one problem, all variants of a seed before the next seed."""
    has_prompts = problem.name.startswith("sd")
    names = [name for name in variants if has_prompts or not VARIANTS[name].needs_prompts]
    if stage == "study":
        return [unlearning(stage, problem, name, seed, pictures) for seed in seeds for name in names]
    if stage == "long":
        return [unlearning(stage, problem, name, seed, pictures, 1, LONG) for seed in seeds for name in names]
    return [
        unlearning(stage, problem, name, seed, pictures, factor)
        for seed in seeds
        for name in names
        for factor in RATES
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if "tshirt" in args.problems and args.data is None and not (args.output_dir / "problems/tshirt/complete").exists():
        raise UsageError("--data: the T-Shirt problem needs digits; give an .npz file, or leave it out by --problems")
    if args.num_workers > 1 and args.worker is None:
        spawn(args.num_workers)
        return
    logging.getLogger("siss_diffusers").setLevel(logging.WARNING)
    pictures = args.output_dir / "pictures"
    problems = [make_problem(name, args) for name in args.problems]
    # A seed at a time through all problems, so that what is there at any time is comparable.
    for problem in problems:
        work([base(problem, pictures)], Results(args.results, problem.digest), args.output_dir / "locks")
    for stage in args.stages:
        for seed in args.seeds:
            for problem in problems:
                todo = tasks(stage, problem, [seed], args.variants, pictures)
                work(todo, Results(args.results, problem.digest), args.output_dir / "locks")


if __name__ == "__main__":
    run(main, "study.py")

"""`unlearning.json`: what a run did."""

import argparse
import os
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

import siss_diffusers
from siss_diffusers.flags import shared_settings
from siss_diffusers.methods import Method
from siss_diffusers.storage.files import write_json


def write_report(
    folder: Path,
    args: argparse.Namespace,
    accelerator: Accelerator,
    method: Method,
    counts: dict[str, int],
    timestep_range: tuple[int, int],
    forget_timestep_ranges: list[tuple[int, int]],
    state: dict[str, int | float],
    **more: object,
) -> None:
    """`unlearning.json`: what was done, and nothing that tells to whom."""
    superfactor = None
    if args.forget_scaling == "fixed":
        # The paper's s for the same coefficient, c = s k / (n - k), with k counting the duplicates.
        superfactor = args.forget_scale * counts["keep"] / max(counts["forget"], counts["train"] - counts["keep"])
    # The name of a folder may tell more than it should.
    base_model = args.pretrained_model_name_or_path
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    write_json(
        folder / "unlearning.json",
        {
            "base_model": None if os.path.exists(base_model) else base_model,
            "method": method.name,
            "method_args": vars(method),
            "forget_scaling": args.forget_scaling,
            "forget_scale": args.forget_scale,
            "superfactor": superfactor,
            "data": counts,
            "settings": shared_settings(args),
            "timestep_range": timestep_range,
            "forget_timestep_ranges": forget_timestep_ranges,
            "num_processes": accelerator.num_processes,
            "pairs_per_step": args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
            **{name: value for name, value in state.items() if name not in ("skipped_in_a_row", "forget_scale")},
            **more,
            "versions": {"siss_diffusers": siss_diffusers.__version__} | {name: version(name) for name in packages},
        },
    )

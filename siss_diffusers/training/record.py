"""`unlearning.json`: what a run did."""

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import siss_diffusers
from siss_diffusers.methods import Method
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import write_json
from siss_diffusers.training.resume import pairs_per_step
from siss_diffusers.training.state import Progress


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


def write_record(
    folder: Path,
    settings: Settings,
    method: Method,
    counts: dict[str, int],
    num_processes: int,
    progress: Progress,
    **more: Any,
) -> None:
    """Write `unlearning.json`: what was done, and nothing that tells to whom.

    Args:
        counts: of images, from `Split.counts`.
        more: further entries.
    """
    superfactor = None
    if settings.forget_scaling == "fixed":
        # The paper's s for the same coefficient, c = s k / (n - k), with k counting the duplicates.
        superfactor = settings.forget_scale * counts["keep"] / max(counts["forget"], counts["train"] - counts["keep"])
    # The name of a folder may tell more than it should.
    base_model = settings.pretrained_model_name_or_path or None
    if base_model is not None and os.path.exists(base_model):
        base_model = None
    base_files = {"revision": settings.revision, "variant": settings.variant} if base_model else {}
    shown = {
        name: value for name, value in asdict(progress).items() if name not in ("skipped_in_a_row", "forget_scale")
    }
    write_json(
        folder / "unlearning.json",
        {
            "base_model": base_model,
            **{f"base_{name}": value for name, value in base_files.items() if value is not None},
            "method": method.name,
            "method_args": vars(method),
            "forget_scaling": settings.forget_scaling,
            "forget_scale": settings.forget_scale,
            "superfactor": superfactor,
            "data": counts,
            "settings": settings.public(),
            **{name: more.pop(name) for name in ("timestep_range", "forget_timestep_ranges")},
            "num_processes": num_processes,
            "pairs_per_step": pairs_per_step(settings, num_processes),
            **shown,
            **more,
            "versions": {"siss_diffusers": siss_diffusers.__version__} | {name: version(name) for name in PACKAGES},
        },
    )

"""Samples during training."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from siss_diffusers.storage.files import append_json_line


def log_validation(args: argparse.Namespace, accelerator: Accelerator, step: int, found: dict) -> None:
    """`found`, from `copy_statistics`, to `validation_log.jsonl` and the tracker."""
    append_json_line(Path(args.output_dir) / "validation_log.jsonl", {"step": step, **found})
    accelerator.log({"copy_share": found["copy_share"]}, step=step)


def log_sample_images(accelerator: Accelerator, name: str, images: torch.Tensor, step: int) -> None:
    """A batch of samples `(N, C, H, W)` in [0, 1] to the tracker."""
    pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pictures}, step=step, **layout)

"""The log of a run, step by step."""

import argparse
import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from siss_diffusers.errors import RunError
from siss_diffusers.gradients.engine import StepStats
from siss_diffusers.storage.files import append_json_line, truncate_json_lines


logger = logging.getLogger(__name__)


class StepLog:
    """Writes each step to `train_log.jsonl`, the tracker and the progress bar, and counts steps in `state`.

    Args:
        state: from `initial_state` or a checkpoint; changed in place.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, state: dict[str, int | float]) -> None:
        self.args = args
        self.accelerator = accelerator
        self.state = state
        self.path = Path(args.output_dir) / "train_log.jsonl"
        self.non_finite: dict[str, list[int]] = {}  # of the steps skipped in a row
        self.progress_bar = tqdm(
            total=args.max_train_steps,
            initial=state["global_step"],
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            for path in (self.path, self.path.with_name("validation_log.jsonl")):
                truncate_json_lines(path, state["global_step"])

    def skip(self, stats: StepStats) -> None:
        """Count and report a step whose gradients were not finite.

        Raises:
            RunError: with a diagnosis, after `--max_skipped_steps` of them in a row.
        """
        self.state["skipped_steps"] += 1
        self.state["skipped_in_a_row"] += 1
        for side, timesteps in stats.non_finite.items():
            self.non_finite.setdefault(side, []).extend(timesteps)
        if self.accelerator.is_main_process:
            in_a_row = self.state["skipped_in_a_row"]
            logger.warning(f"Skipped a step, its gradients were not finite ({in_a_row} in a row)")
        if self.state["skipped_in_a_row"] >= self.args.max_skipped_steps:
            raise RunError(self._diagnosis())

    def _diagnosis(self) -> str:
        gathered: dict[str, list[int]] = {}
        for part in gather_object([self.non_finite]) if self.accelerator.num_processes > 1 else [self.non_finite]:
            for side, timesteps in part.items():
                gathered.setdefault(side, []).extend(timesteps)
        precision = self.accelerator.mixed_precision
        what = " and ".join(
            f"the {side} loss was not finite at timesteps {min(found)} to {max(found)} ({len(found)} rows)"
            for side, found in gathered.items()
        )
        if not what:
            what = "every loss was finite and only gradients were not"
        if precision == "fp16":
            cure = "fp16 overflows here: use --mixed_precision bf16 or no"
        elif self.state["global_step"] == 0:
            cure = "no step was taken before, so look at the starting model and the images first"
        else:
            cure = "lower --learning_rate or --forget_scale, or leave out these timesteps by --timestep_range"
        return (
            f"the gradients of {self.state['skipped_in_a_row']} steps in a row were not finite, after"
            f" {self.state['global_step']} good ones, in precision {precision}: {what}; {cure}"
        )

    def write(self, stats: StepStats, learning_rate: float, seconds: float, **more: float) -> None:
        """Count and log a step that was taken."""
        self.state["skipped_in_a_row"] = 0
        self.non_finite = {}
        self.state["global_step"] += 1
        self.state["one_sided_steps"] += stats.one_sided and self.args.forget_scaling in ("relative", "norm", "nash")
        self.state["train_seconds"] += seconds
        if stats.grad_norm_forget is not None and not stats.one_sided:
            self.state["forget_scale"] = stats.forget_scale
        logs = {
            "keep_loss": stats.keep_loss,
            "forget_loss": stats.forget_loss,
            "grad_norm_keep": stats.grad_norm_keep,
            "grad_norm_forget": stats.grad_norm_forget,
            "forget_scale": stats.forget_scale,
            "lr": learning_rate,
        }
        if stats.forget_active is not None:
            logs["forget_active"] = stats.forget_active
        logs |= more
        known = {name: value for name, value in logs.items() if value is not None}
        self.progress_bar.update(1)
        self.progress_bar.set_postfix({name: f"{value:.3g}" for name, value in known.items()})
        self.accelerator.log(known, step=self.state["global_step"])
        if self.accelerator.is_main_process:
            append_json_line(self.path, {"step": self.state["global_step"], **logs, "step_seconds": seconds})

"""The log of a run, step by step."""

import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from siss_diffusers.errors import RunError
from siss_diffusers.gradients.stats import StepStats
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import append_json_line, truncate_json_lines
from siss_diffusers.training.state import Progress
from siss_diffusers.training.trackers import Trackers


logger = logging.getLogger(__name__)


class StepLog:
    """Writes each step to `train_log.jsonl`, the tracker and the progress bar, and counts steps.

    Args:
        progress: changed in place.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        output_dir: Path,
        progress: Progress,
        trackers: Trackers,
    ) -> None:
        self.settings, self.trackers = settings, trackers
        self.accelerator = accelerator
        self.progress = progress
        self.path = output_dir / "train_log.jsonl"
        self.non_finite: dict[str, list[int]] = {}  # of the steps skipped in a row
        self.progress_bar = tqdm(
            total=settings.max_train_steps,
            initial=progress.global_step,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            for path in (self.path, self.path.with_name("validation_log.jsonl")):
                truncate_json_lines(path, progress.global_step)

    def skip(self, stats: StepStats) -> None:
        """Count and report a step whose gradients were not finite.

        Raises:
            RunError: with a diagnosis, after `--max_skipped_steps` of them in a row.
        """
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        for side, timesteps in stats.non_finite.items():
            self.non_finite.setdefault(side, []).extend(timesteps)
        in_a_row = self.progress.skipped_in_a_row
        if self.accelerator.is_main_process:
            logger.warning(f"Skipped a step, its gradients were not finite ({in_a_row} in a row)")
        if in_a_row >= self.settings.max_skipped_steps:
            raise RunError(self._diagnosis())

    def _diagnosis(self) -> str:
        gathered: dict[str, list[int]] = {}
        for part in gather_object([self.non_finite]) if self.accelerator.num_processes > 1 else [self.non_finite]:
            for side, timesteps in part.items():
                gathered.setdefault(side, []).extend(timesteps)
        precision = self.accelerator.mixed_precision
        what = " and ".join(
            f"the {side} loss was not finite at timesteps {min(timesteps)} to {max(timesteps)} ({len(timesteps)} rows)"
            for side, timesteps in gathered.items()
        )
        if not what:
            what = "every loss was finite and only gradients were not"
        if precision == "fp16":
            cure = "fp16 overflows here: use --mixed_precision bf16 or no"
        elif self.progress.global_step == 0:
            cure = "no step was taken before, so look at the starting model and the images first"
        else:
            cure = "lower --learning_rate or --forget_scale, or leave out these timesteps by --timestep_range"
        return (
            f"the gradients of {self.progress.skipped_in_a_row} steps in a row were not finite, after"
            f" {self.progress.global_step} good ones, in precision {precision}: {what}; {cure}"
        )

    def write(self, stats: StepStats, seconds: float, **more: float) -> None:
        """Count and log a step that was taken.

        Args:
            more: further figures, `lr` among them.
        """
        progress = self.progress
        progress.skipped_in_a_row = 0
        self.non_finite = {}
        progress.global_step += 1
        progress.one_sided_steps += stats.one_sided and self.settings.forget_scaling not in (None, "fixed")
        progress.train_seconds += seconds
        if stats.grad_norm_forget is not None and not stats.one_sided:
            progress.forget_scale = stats.forget_scale
        figures = {
            "keep_loss": stats.keep_loss,
            "forget_loss": stats.forget_loss,
            "grad_norm_keep": stats.grad_norm_keep,
            "grad_norm_forget": stats.grad_norm_forget,
            "forget_scale": stats.forget_scale,
            "lr": more.pop("lr"),
        }
        if stats.forget_active is not None:
            figures["forget_active"] = stats.forget_active
        figures |= more
        known = {name: value for name, value in figures.items() if value is not None}
        self.progress_bar.update(1)
        self.progress_bar.set_postfix({name: f"{value:.3g}" for name, value in known.items()})
        self.trackers.log(known, step=progress.global_step)
        if self.accelerator.is_main_process:
            append_json_line(self.path, {"step": progress.global_step, **figures, "step_seconds": seconds})

    def close(self) -> None:
        """Leave the progress bar as it is."""
        self.progress_bar.close()

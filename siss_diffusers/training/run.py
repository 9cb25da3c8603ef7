"""What one run owns: its folder, its processes, its log, its signals and its checkpoints."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from siss_diffusers.distributed import on_main_process
from siss_diffusers.errors import Interrupted
from siss_diffusers.gradients.stats import StepStats
from siss_diffusers.hub.upload import check_repo_id, create_repository, push_again_command, push_run
from siss_diffusers.methods import Method
from siss_diffusers.settings import Settings
from siss_diffusers.storage.checkpoints import is_saved, save_checkpoint, save_result, tidy
from siss_diffusers.storage.tensors import load_state
from siss_diffusers.training.engines import (
    make_accelerator,
    saves_checkpoints,
    set_up_logging,
)
from siss_diffusers.training.log import StepLog
from siss_diffusers.training.output_dir import clear_output_dir
from siss_diffusers.training.resume import (
    DataPart,
    check_resumed,
    describe_run,
    find_resumed,
    pairs_per_step,
    planned_positions,
)
from siss_diffusers.training.signals import StopSignal
from siss_diffusers.training.state import Progress
from siss_diffusers.training.trackers import Trackers


logger = logging.getLogger(__name__)


class Run:
    """Owns files, processes and the log of a run. It never sees a loss, a target or a family.

    Args:
        settings: from `resolve`.
        is_program: whether the run is a program of its own: it then sets up logging, and stops cleanly at a signal.
        saves_model: whether the result is saved in the folder, too, and not its records alone.

    Attributes:
        settings: with what the launcher said, and the length in steps once the data is known.
        checkpoint: the one that the run goes on from; None for a new run.
        saved: the content of its `state.json`, tensors not yet read.
        description: what decides the steps, for checkpoints.
    """

    def __init__(
        self, settings: Settings, method: Method, output_dir: Path, is_program: bool, saves_model: bool = True
    ) -> None:
        self.output_dir, self.is_program, self.method, self.saves_model = output_dir, is_program, method, saves_model
        self.accelerator = make_accelerator(settings, output_dir)
        # What the launcher or its configuration said, where the flag said nothing.
        self.settings = settings.replace(mixed_precision=self.accelerator.mixed_precision)
        if is_program:
            set_up_logging(self.accelerator)
        self.repo_id = self._prepare_repository()
        self.checkpoint = find_resumed(self.settings, output_dir)
        self.num_positions = planned_positions(self.settings, self.accelerator.num_processes, self.checkpoint)
        self.saved: dict[str, Any] | None = None
        self.progress = Progress()
        self.description: dict = {}
        self.steps_per_epoch = 1
        self.trackers = Trackers(self.accelerator)
        self.log: StepLog | None = None
        self.stop_signal: StopSignal | None = None

    @property
    def pairs_per_step(self) -> int:
        return pairs_per_step(self.settings, self.accelerator.num_processes)

    def _prepare_repository(self) -> str | None:
        """Create the repository of --push_to_hub before the training, where a bad token shows at once."""
        if not self.settings.push_to_hub:
            return None
        repo_id = self.settings.hub_model_id or self.output_dir.resolve().name
        check_repo_id(repo_id, "--hub_model_id")
        settings = self.settings
        return on_main_process(lambda: create_repository(repo_id, settings.hub_token, settings.hub_private_repo))

    def set_data(self, data: dict[str, DataPart], num_keep: int) -> None:
        """Record the data, refuse to resume another run, and find the length of this one.

        Raises:
            UsageError: naming what differs from the run that made the checkpoint.
        """
        self.description = describe_run(
            self.settings, self.method, self.accelerator.num_processes, self.checkpoint, data
        )
        if self.checkpoint is not None:
            check_resumed(self.settings, self.checkpoint, self.description, data)
            self.saved = load_state(self.checkpoint)
            self.progress = Progress(**self.saved["progress"])
        self.steps_per_epoch = math.ceil(num_keep / self.pairs_per_step)
        if self.settings.max_train_steps is None:
            steps = self.settings.num_train_epochs * self.steps_per_epoch
            self.settings = self.settings.replace(max_train_steps=steps)
        if self.settings.scale_lr:
            self.settings = self.settings.replace(learning_rate=self.settings.learning_rate * self.pairs_per_step)

    def start(self, model_files: Sequence[str]) -> None:
        """Prepare the folder, the trackers and the log.

        Args:
            model_files: files and folders of the model that the run saves.
        """
        if self.checkpoint is not None:
            self.print(f"Resuming from {self.checkpoint.name}")
        if self.accelerator.is_main_process:
            if self.settings.overwrite_output_dir and self.settings.resume_from_checkpoint is None:
                clear_output_dir(self.output_dir, tuple(model_files))
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tidy(self.output_dir, self.checkpoint)
        self.accelerator.wait_for_everyone()
        self.trackers.start(self.settings)
        self.log = StepLog(self.settings, self.accelerator, self.output_dir, self.progress, self.trackers)
        if self.is_program:
            self.stop_signal = StopSignal()

    def print(self, text: str) -> None:
        """Print on the main process."""
        self.accelerator.print(text)

    @property
    def stop_requested(self) -> bool:
        return self.stop_signal is not None and self.stop_signal.received is not None

    def stops(self, stats: StepStats) -> bool:
        """Tell whether to stop now, the same on all processes; several learn of it with the next step's gradients."""
        asked = stats.stop or (self.accelerator.num_processes == 1 and self.stop_requested)
        return asked and self.progress.global_step < self.settings.max_train_steps

    def saves_at(self, interval: int | None) -> bool:
        """Tell whether the step that was just taken is a multiple of an interval."""
        return interval is not None and self.progress.global_step % interval == 0

    def is_epoch(self, epochs: int | None) -> bool:
        """Tell whether so many passes over the keep set ended with the step that was just taken, or a multiple."""
        return epochs is not None and self.saves_at(epochs * self.steps_per_epoch)

    def save_checkpoint(self, write: Callable[[Path | None], None], sharded: bool) -> None:
        """Save a checkpoint, on the main process.

        Args:
            write: fills a folder. With None it hands over the shards of a process that does not write.
            sharded: whether there are any.
        """
        if not saves_checkpoints(self.accelerator):
            return
        # A run that stops while steps are skipped may have saved this step before: there is nothing new.
        step, main = self.progress.global_step, self.accelerator.is_main_process
        skip = main and is_saved(self.output_dir, step)
        if sharded:
            (skip,) = broadcast_object_list([skip])
        if skip:
            return
        if main:
            limit = self.settings.checkpoints_total_limit
            logger.info(f"Saved {save_checkpoint(self.output_dir, step, write, limit).name}")
        elif sharded:
            write(None)

    def save_result(self, write: Callable[[Path | None], None], sharded: bool, last: str) -> None:
        """Save the result, on the main process; arguments as of `save_checkpoint`.

        Args:
            last: the file that is moved into place last.
        """
        if self.accelerator.is_main_process:
            save_result(self.output_dir, write, last)
        elif sharded:
            write(None)

    def stop(self) -> None:
        """End a run that a signal stopped, once the main process has saved the checkpoint of this step.

        Raises:
            Interrupted: always.
        """
        self.accelerator.wait_for_everyone()
        step = self.progress.global_step
        if saves_checkpoints(self.accelerator):
            self.print(f"Stopped at checkpoint-{step}; go on with --resume_from_checkpoint latest")
        else:
            self.print(f"Stopped at step {step}, and nothing is saved: under DeepSpeed there are no checkpoints")
        self.trackers.finish()
        self.stop_signal.close()
        raise Interrupted(self.stop_signal.number)

    def finish(self) -> None:
        """End the run after its result is saved: publish it, unless a signal asked to stop.

        Raises:
            Interrupted: where one did.
            RunError: where the upload fails.
        """
        if self.stop_signal is not None:
            self.stop_signal.close()
        self.trackers.finish()
        if self.repo_id is None or not self.accelerator.is_main_process:
            return
        if self.stop_requested:
            print(
                f"Saved, but not pushed, because a signal came first: {push_again_command(self.output_dir, self.repo_id)}"
            )
            raise Interrupted(self.stop_signal.number)
        logger.info(push_run(self.output_dir, self.repo_id, self.settings.hub_token))

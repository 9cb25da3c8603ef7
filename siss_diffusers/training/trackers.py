"""The tracker of a run. Where it fails in the middle, the run goes on without it."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.settings import Settings


logger = logging.getLogger(__name__)


class Trackers:
    """Sends figures and pictures to the tracker of the accelerator, until it fails.

    Attributes:
        failed: whether it did; nothing is sent any more.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.failed = accelerator, False

    def start(self, settings: Settings) -> None:
        """Start the tracker, which is told what may be published.

        Raises:
            UsageError: where it does not start.
        """
        if settings.report_to == "none":
            return
        # Without its metadata: wandb would record the command line, and with it the names of forget files.
        init_kwargs = {"wandb": {"settings": {"x_disable_meta": True}}}
        project = settings.tracker_project_name
        try:
            self.accelerator.init_trackers(project, config=settings.public(), init_kwargs=init_kwargs)
        except Exception as error:  # whatever a tracker may raise
            raise UsageError(
                f"--report_to {settings.report_to} does not start ({describe_error(error)}); repair that, or use"
                " --report_to none"
            ) from error

    def log(self, figures: dict[str, float | None], step: int) -> None:
        """Log figures; those that are None are left out."""
        known = {name: value for name, value in figures.items() if value is not None}
        self._unless_it_fails(lambda: self.accelerator.log(known, step=step))

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Log a batch of pictures `(N, C, H, W)` in [0, 1]; what is no number is black."""
        pictures = images.nan_to_num(0, 0, 0).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

        def log() -> None:
            for tracker in self.accelerator.trackers:
                layout: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pictures}, step=step, **layout)

        self._unless_it_fails(log)

    def finish(self) -> None:
        """End the tracker and the processes' group."""
        try:
            self.accelerator.end_training()
        except Exception as error:  # the result is saved already
            self._warn(error)
            self.accelerator.trackers = []
            self.accelerator.end_training()

    def _unless_it_fails(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker may raise: a lost connection, a full disk
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.failed:
            logger.warning(
                f"The tracker failed ({describe_error(error)}); training goes on without it, and every step is in"
                " train_log.jsonl"
            )
        self.failed = True

"""Samples during training: copies are counted, and pictures go to the tracker."""

import logging
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from siss_diffusers.families import Conditions, Family, Sampling
from siss_diffusers.gradients.stats import StepStats
from siss_diffusers.metrics.base import NO_PICTURE
from siss_diffusers.metrics.broken import broken
from siss_diffusers.metrics.copies import CopyDetectors, copy_statistics
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import append_json_line
from siss_diffusers.training.network import TrainedNetwork
from siss_diffusers.training.run import Run
from siss_diffusers.training.samples import Samples
from siss_diffusers.training.training_set import TrainingSet


logger = logging.getLogger(__name__)

# With calibration the share of the forget weight that is still pushed tells, without a sample, when looking is worth it. It
# is that of the few rows of one step, and runs that left no copy ended at 0.05 to 0.31.
NEARLY_FORGOTTEN = 0.3


class Validation:
    """Samples from the network as it is, and looks for copies of the forget images.

    The detectors are those of `siss evaluate`: the same size, calibrated on images to keep.
    """

    def __init__(
        self,
        run: Run,
        family: Family,
        pipeline: Any,
        network: TrainedNetwork,
        samples: Samples,
        training_set: TrainingSet,
    ) -> None:
        self.run, self.settings, self.accelerator = run, run.settings, run.accelerator
        self.family, self.pipeline, self.network, self.samples = family, pipeline, network, samples
        self.every = validation_interval(run)
        self.detectors, self.are_blind = None, False
        if self.accelerator.is_main_process and (self.every or self.settings.save_images_epochs):
            split = training_set.split
            references = training_set.pictures(split.forget, range(len(split.forget)))
            keep = training_set.pictures(split.train, training_set.detector_rows)
            self.detectors = CopyDetectors.calibrated(references, keep)
            self.are_blind = self.detectors.are_blind
            if self.are_blind:
                logger.warning(
                    "Copies cannot be counted: an image to keep looks like a forget image. No validation will find"
                    " that it is forgotten, and no sample is logged; remove that image from the images to keep"
                )

    def is_due(self, stats: StepStats) -> bool:
        """Tell whether to look after this step."""
        step, last = self.run.progress.global_step, self.settings.max_train_steps
        if stats.skipped or not self.every or step % self.every != 0:
            return False
        waits = self.settings.stop_when_forgotten and stats.forget_active is not None and step < last
        if waits and stats.forget_active >= NEARLY_FORGOTTEN:
            logger.info(
                f"Step {step}: not looked, {100 * stats.forget_active:.0f} % of the forget side is still pushed"
            )
            return False
        return True

    def finds_no_copy(self) -> bool:
        """Count the copies among fresh samples for the forget images; return whether there is none.

        What cannot be judged is never a reason to stop: with a sample that is no picture, the answer is no.

        Samples of --validation_prompts go to the tracker, copies blanked out.
        """
        step, rows = self.run.progress.global_step, self.samples.forget_prompt_rows
        images = self.draw(rows, self.settings.num_validation_images)
        forgotten = [False]
        if self.accelerator.is_main_process:
            statistics = copy_statistics(self.detectors.flags(images), broken(images))
            if self.are_blind:
                statistics |= {"copy_share": None, "copy_share_low": 0.0, "copy_share_high": 1.0}
            append_json_line(self.run.output_dir / "validation_log.jsonl", {"step": step, **statistics})
            shares = {name: statistics[name] for name in ("copy_share", "broken_share")}
            self.run.trackers.log(shares, step)
            say(step, **shares)
            forgotten = [statistics["copy_share"] == 0 and statistics["broken_share"] == 0]
        for index, row in enumerate(self.samples.validation_rows):
            self.log_images(f"validation_{index}", self.draw((row,), self.settings.num_validation_images))
        return broadcast_object_list(forgotten)[0]

    def log_samples(self) -> None:
        """Log samples of an unconditional model to the tracker, copies blanked out."""
        self.log_images("samples", self.draw((), self.settings.eval_batch_size))

    def log_images(self, name: str, images: Tensor | None) -> None:
        """Log a batch of samples; what must be forgotten is not logged."""
        if not self.accelerator.is_main_process or self.are_blind:
            return
        images[self.detectors.flags(images)["any"]] = 0.5
        self.run.trackers.log_images(name, images, self.run.progress.global_step)

    def draw(self, rows: tuple[int, ...], samples_of_each: int) -> Tensor | None:
        """Sample on the main process; with sharded weights on all of them, which have to take part.

        Args:
            rows: of the table of conditions; empty for unconditional models.
        """
        if not (self.accelerator.is_main_process or self.network.sharded):
            return None
        settings, unconditional = self.settings, None
        conditions = Conditions({}, samples_of_each)
        if rows:
            conditions = self.samples.conditions_of([row for row in rows for _ in range(samples_of_each)])
            unconditional = self.samples.conditions_of([self.samples.empty_row])
        with self.network.averaged(), self.accelerator.autocast():
            images = self.family.sample(self.pipeline, conditions, unconditional, sampling_of(settings))
            self.network.reshard()
        return images


def say(step: int, copy_share: float | None, broken_share: float) -> None:
    """Log what a validation found, samples that are no pictures first."""
    if broken_share > 0:
        logger.warning(
            f"Step {step}: {100 * broken_share:.2f} % of the samples are broken ({NO_PICTURE}); they do not count as"
            " forgotten"
        )
    if copy_share is not None:
        logger.info(f"Step {step}: {100 * copy_share:.2f} % of the samples are copies")


def sampling_of(settings: Settings) -> Sampling:
    """Return how a run draws its samples."""
    return Sampling(
        settings.num_inference_steps, settings.guidance_scale, settings.eval_batch_size, seed=settings.seed
    )


def validation_interval(run: Run) -> int | None:
    """Return after how many steps to look; None for never."""
    if run.settings.validation_epochs is not None:
        return run.settings.validation_epochs * run.steps_per_epoch
    return run.settings.validation_steps

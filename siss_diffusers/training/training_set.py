"""The training set of a run: what to keep, what to forget, their prompts, and the ordinary images to compare with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor, cat

from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS
from siss_diffusers.data.captions import load_captions, same_captions
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.keep_order import KeepOrder
from siss_diffusers.data.latents import MAX_NEIGHBOR_CANDIDATES
from siss_diffusers.data.split import GivenRows, Split, split_data
from siss_diffusers.families import Family
from siss_diffusers.methods import Method
from siss_diffusers.metrics.copies import MAX_KEEP_IMAGES
from siss_diffusers.settings import Settings
from siss_diffusers.similarity import for_detectors
from siss_diffusers.storage.files import NEAR_DUPLICATES
from siss_diffusers.training.resume import DataPart


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """A split, its prompts, and the rows of the keep set that are used beside the pairs.

    Args:
        train_captions, forget_captions: None for unconditional models.
        calibration_rows: images whose losses the thresholds of calibrated forgetting are measured on.
        detector_rows: images that the copy detectors are calibrated on.
        neighbor_rows: images among which the neighbours of forget images are searched.
        redirect_rows: images that forget images are redirected to, of the same prompts.
        other_redirect_rows: those that stand in where a prompt has none, or there are no prompts.
    """

    split: Split
    train_captions: pa.ChunkedArray | None
    forget_captions: list[str] | None
    calibration_rows: list[int]
    detector_rows: list[int]
    neighbor_rows: list[int]
    redirect_rows: list[int]
    other_redirect_rows: list[int]

    @property
    def compared_rows(self) -> set[int]:
        """Return the rows of the keep set that are encoded beside those of the pairs."""
        return {*self.calibration_rows, *self.neighbor_rows, *self.redirect_rows, *self.other_redirect_rows}

    def captions_of(self, rows: Sequence[int]) -> list[str]:
        """Return the prompts of rows of the training set."""
        return self.train_captions.take(pa.array(rows, pa.int64())).to_pylist()

    def parts(self) -> dict[str, DataPart]:
        """Return what identifies the data in checkpoints."""
        order = self.split.order
        advice = ""
        if order.near is None:
            advice = "without --no-drop_near_duplicates near copies of forget images are left out"
        elif order.near_copies:
            advice = f"near copies left out now: {len(order.near_copies)}; --no-drop_near_duplicates keeps them"
        parts = {
            "images to keep": DataPart(len(order.candidates), order.digests[order.drawn], advice),
            "images to forget": DataPart(len(self.split.forget), self.split.forget_digests),
        }
        if self.train_captions is not None:
            used = [caption.encode() for caption in self.forget_captions + self.captions_of(order.drawn)]
            parts["prompts"] = DataPart(len(self.forget_captions) + len(order.candidates), used)
        return parts

    def pictures(self, images: Images, rows: Sequence[int]) -> Tensor:
        """Return pictures `(N, C, H, W)` in [0, 1], at the size of `for_detectors`: 2,000 of 512 pixels take 6 GB."""
        return cat([for_detectors(images.load(int(row))[None] / 2 + 0.5) for row in rows])


def image_transform(settings: Settings, family: Family) -> ImageTransform:
    """Return what makes tensors of the pictures of a run."""
    return ImageTransform(
        channels=family.channels,
        resolution=family.resolution,
        center_crop=settings.center_crop,
        random_flip=settings.random_flip,
        preserve_input_precision=settings.preserve_input_precision,
        interpolation=settings.image_interpolation_mode,
    )


def read_training_set(
    settings: Settings, family: Family, method: Method, given: GivenRows, num_positions: int | None
) -> TrainingSet:
    """Split the data and read the prompts. Everything that can be wrong with the data is found here.

    Args:
        num_positions: how far the order of the images to keep is checked; None: every image.

    Raises:
        UsageError: for a set that is empty, an image that cannot be used, or a prompt that is missing.
    """
    split = split_data(
        given,
        image_transform(settings, family),
        settings.seed,
        num_positions,
        settings.max_train_samples,
        settings.drop_near_duplicates,
    )
    order, train_captions, forget_captions, alike = split.order, None, None, None
    if family.has_prompts:
        train_captions = load_captions(split.train, settings.caption_column, order.candidates)
        forget_captions = load_captions(split.forget, settings.caption_column).to_pylist()
        # Ordinary images to compare with: of the prompts of the forget images, where there are any.
        alike = same_captions(train_captions, forget_captions, family.sees_case)

    def first_alike(count: int, wanted: bool) -> list[int]:
        return (order.first(count, alike) or order.first(count)) if wanted else []

    validates = settings.validation_steps or settings.validation_epochs or settings.save_images_epochs
    neighbor_rows = order.first(MAX_NEIGHBOR_CANDIDATES, alike) if "neighbors" in method.needs else []
    redirect_rows, other_redirect_rows = [], []
    if "posterior_mean" in method.needs:
        redirect_rows, other_redirect_rows = rows_to_redirect_to(
            order, train_captions, forget_captions, settings.num_redirect_images, family.sees_case
        )
    return TrainingSet(
        split,
        train_captions,
        forget_captions,
        first_alike(NUM_BINS * DRAWS_PER_BIN, settings.calibrate_forgetting is not None),
        first_alike(MAX_KEEP_IMAGES, bool(validates)),
        neighbor_rows,
        redirect_rows,
        other_redirect_rows,
    )


def rows_to_redirect_to(
    order: KeepOrder,
    train_captions: pa.ChunkedArray | None,
    forget_captions: list[str] | None,
    count: int,
    sees_case: bool = False,
) -> tuple[list[int], list[int]]:
    """Choose the images to keep that forget images are redirected to: the first of the order, whatever is drawn.

    Returns:
        Up to `count` rows of each prompt of a forget image; and up to `count` rows of any prompt, where a prompt has none.
    """
    if train_captions is None:
        return [], order.first(count)
    by_prompt = [
        order.first(count, same_captions(train_captions, [caption], sees_case)) for caption in set(forget_captions)
    ]
    return sorted({row for rows in by_prompt for row in rows}), [] if all(by_prompt) else order.first(count)


def log_counts(training_set: TrainingSet) -> None:
    """Log how many images are kept, forgotten and left out."""
    counts = training_set.split.counts()
    logger.info(
        f"Keep {counts['keep']}, forget {counts['forget']} images; removed {counts['duplicates_removed']} exact"
        f" duplicates of forget images from the keep set, among the {counts['checked']} images that may be used"
    )
    if counts["near_duplicates_removed"]:
        logger.warning(
            f"Near copies of forget images, removed from the keep set, too: {counts['near_duplicates_removed']}; look at"
            f" {NEAR_DUPLICATES}, and add --no-drop_near_duplicates if they are to be kept"
        )


def crops_are_random(settings: Settings, training_set: TrainingSet) -> bool:
    """Tell whether a crop of some image that will be used has something to choose; reads headers only."""
    if settings.center_crop:
        return False
    split = training_set.split
    used = {*split.order.drawn.tolist(), *training_set.compared_rows}
    return not (split.train.all_square(used) and split.forget.all_square())

"""What the pairs of a run are made of: images or latents, the conditions of their prompts, and neighbours."""

import gc
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS
from siss_diffusers.data.latents import Latents, LoadsImages, nearest_neighbors
from siss_diffusers.data.pairs import PairDataset, WindowSampler, first_positions, window_loader
from siss_diffusers.data.strangers import Strangers
from siss_diffusers.draws import shuffled_index
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Conditions, Family
from siss_diffusers.families.prompts import Prompts
from siss_diffusers.methods import Method
from siss_diffusers.noising import timestep_density
from siss_diffusers.settings import Settings
from siss_diffusers.training.redirection import KeepPosterior
from siss_diffusers.training.training_set import TrainingSet, crops_are_random


logger = logging.getLogger(__name__)

# Strangers are made of at most so many of the images to forget: more than a threshold is measured on.
MAX_TURNED_IMAGES = NUM_BINS * DRAWS_PER_BIN // 3

# A prompt of Stable Diffusion 1.x takes 236 KB in float32, and a data set may have 100,000 different ones.
MAX_TABLE_ON_DEVICE = 2**30


@dataclass
class Samples:
    """Images or latents by number, and what the network is told of each.

    Args:
        keep, forget: what to keep and what to forget, as the network sees it.
        is_cached: whether all latents that will be drawn are in memory, so that the VAE is not needed.
        neighbors: of each forget image, for a method that needs them.
        keep_posterior: what forget images are redirected to, for a method that needs it.
        strangers: images that the model never saw, where thresholds are measured on them.
        stranger_sources: the forget image that each stranger was made of.
        device: that of the network.
        conditions: a row for each distinct prompt that is used, on the device, or on the host if the table is large; None
            for unconditional models.
        keep_conditions, forget_conditions: the row of each image.
        forget_prompt_rows: rows of the distinct prompts of the forget images.
        validation_rows: rows of --validation_prompts.
        empty_row: row of the empty prompt.
    """

    keep: LoadsImages
    forget: LoadsImages
    device: torch.device | str
    is_cached: bool = False
    neighbors: list[list[int]] | None = None
    keep_posterior: KeepPosterior | None = None
    strangers: LoadsImages | None = None
    stranger_sources: tuple[int, ...] = ()
    conditions: Conditions | None = None
    keep_conditions: dict[int, int] | None = None
    forget_conditions: list[int] | None = None
    forget_prompt_rows: tuple[int, ...] = ()
    validation_rows: tuple[int, ...] = ()
    empty_row: int | None = None

    def conditions_of(self, rows: Tensor | list[int] | None) -> Conditions | None:
        """Return the conditions of these rows, on the device; None for unconditional models."""
        return None if self.conditions is None else self.conditions[rows].to(self.device)


@dataclass(frozen=True)
class Drawn:
    """The images that the seeded order will draw, known before training.

    Args:
        keep_rows: of the images to keep also those to compare with.
        forget_rows: of the images to forget; all of them where neighbours are searched.
    """

    keep_rows: list[int]
    forget_rows: list[int]


def drawn_images(
    settings: Settings, method: Method, training_set: TrainingSet, sampler: WindowSampler, num_windows: int
) -> Drawn:
    """Find out what the first `num_windows` windows of this process draw."""
    positions = first_positions(sampler, num_windows)
    order, num_forget = training_set.split.order, len(training_set.split.forget)
    keep_rows = {order[position] for position in positions}
    forget_rows = {shuffled_index(settings.seed, 1, position, num_forget) for position in positions}
    if "neighbors" in method.needs:
        forget_rows = set(range(num_forget))
    keep_rows |= training_set.compared_rows
    return Drawn(sorted(keep_rows), sorted(forget_rows))


def decide_caching(settings: Settings, training_set: TrainingSet) -> bool:
    """Decide whether latents are cached: not where augmentation is random.

    Raises:
        UsageError: where --cache_latents cannot be.
    """
    random_crops = crops_are_random(settings, training_set)
    if settings.cache_latents and random_crops:
        raise UsageError(
            "--cache_latents: some images are not square, and a cached latent cannot be cropped; add --center_crop"
        )
    if random_crops and settings.cache_latents is None and not settings.random_flip:
        logger.warning(
            "Some images are not square, and a random part of them is cropped: every image is encoded anew each time it is"
            " drawn, in the main process. Add --center_crop to encode each once"
        )
    return settings.cache_latents is not False and not (settings.random_flip or random_crops)


def prepare_samples(
    settings: Settings,
    family: Family,
    pipeline: Any,
    method: Method,
    training_set: TrainingSet,
    drawn: Drawn | None,
    device: torch.device,
    show_progress: bool,
) -> Samples:
    """Encode what the run will draw, and search neighbours, before the network is loaded.

    Args:
        pipeline: its text encoders and its VAE; the network may be missing.
        drawn: from `drawn_images`; None for unconditional models.
        device: that of the network.
    """
    split = training_set.split
    samples = Samples(split.train, split.forget, device)
    if threshold_source(settings, method) in ("strangers", "both"):
        strangers = Strangers(split.forget, images_to_turn(settings.seed, split.forget_digests))
        samples.strangers = strangers
        samples.stranger_sources = tuple(strangers.source_of(index) for index in range(len(strangers)))
    if family.has_prompts:
        number_prompts(settings, family, pipeline, training_set, drawn, samples)
    if family.has_latents:
        encode_images(
            family, pipeline, training_set, drawn, samples, decide_caching(settings, training_set), show_progress
        )
    if "neighbors" in method.needs:
        candidates = training_set.neighbor_rows
        logger.info(f"Searching the neighbours of the forget images among {len(candidates)} keep images")
        samples.neighbors = nearest_neighbors(
            samples.keep,
            samples.forget,
            method.num_neighbors,
            candidates,
            samples.keep_conditions,
            samples.forget_conditions,
        )
    if "posterior_mean" in method.needs:
        rows, other_rows = training_set.redirect_rows, training_set.other_redirect_rows
        samples.keep_posterior = KeepPosterior.of_rows(samples.keep, rows, other_rows, samples.keep_conditions, device)
        images = samples.keep_posterior.images
        logger.info(f"Redirecting to {len(images)} images to keep, which take {images.nbytes / 1e6:.0f} MB")
    return samples


def images_to_turn(seed: int, digests: list[bytes]) -> list[int]:
    """Choose the images to forget that strangers are made of: the first in the order in which they are drawn, each picture
    once however many copies of it there are."""
    chosen: dict[bytes, int] = {}
    for position in range(len(digests)):
        index = shuffled_index(seed, 1, position, len(digests))
        chosen.setdefault(digests[index], index)
    return list(chosen.values())[:MAX_TURNED_IMAGES]


def threshold_source(settings: Settings, method: Method) -> str | None:
    """Return whose losses set the thresholds, one of `THRESHOLD_SOURCES`; None where there are none."""
    if settings.calibrate_forgetting is None:
        return None
    return settings.threshold_source or method.threshold_source


def number_prompts(
    settings: Settings,
    family: Family,
    pipeline: Any,
    training_set: TrainingSet,
    drawn: Drawn,
    samples: Samples,
) -> None:
    """Fill in the conditions of every prompt that will be used."""
    prompts = Prompts(family, pipeline)
    forget_numbers = prompts.number(training_set.forget_captions)
    keep_numbers = prompts.number(training_set.captions_of(drawn.keep_rows))
    (empty,), validation_numbers = prompts.number([""]), prompts.number(settings.validation_prompts)
    prompts.warn_of_truncated()
    table, row_of = prompts.embed({*forget_numbers, *keep_numbers, *validation_numbers, empty})
    # With an adapter the frozen weights can be in half precision, and what they are told as well.
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.mixed_precision, torch.float32)
    table = table.to("cpu", precision)
    samples.conditions = table if table.nbytes > MAX_TABLE_ON_DEVICE else table.to(samples.device)
    samples.keep_conditions = {row: row_of[number] for row, number in zip(drawn.keep_rows, keep_numbers)}
    samples.forget_conditions = [row_of[number] for number in forget_numbers]
    samples.forget_prompt_rows = tuple(row_of[number] for number in sorted(set(forget_numbers)))
    samples.validation_rows = tuple(row_of[number] for number in validation_numbers)
    samples.empty_row = row_of[empty]


def encode_images(
    family: Family,
    pipeline: Any,
    training_set: TrainingSet,
    drawn: Drawn,
    samples: Samples,
    cache: bool,
    show_progress: bool,
) -> None:
    """Replace images by their latents, in memory where they are cached."""

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = family.encode(pipeline, pixels[None])
        return mean[0].cpu(), deviation[0].cpu()

    scale, split = family.latent_scaling(pipeline), training_set.split
    keep, forget = (Latents(images, encode, scale) for images in (split.train, split.forget))
    if cache:
        started = time.perf_counter()
        keep.cache(drawn.keep_rows, progress=show_progress)
        forget.cache(drawn.forget_rows)
        logger.info(
            f"Encoded {len(drawn.keep_rows) + len(drawn.forget_rows)} images in {time.perf_counter() - started:.1f} s;"
            f" their latents take {(keep.cached_bytes + forget.cached_bytes) / 1e6:.0f} MB of memory"
        )
    samples.keep, samples.forget, samples.is_cached = keep, forget, cache
    if samples.strangers is not None:
        samples.strangers = Latents(samples.strangers, encode, scale)
        samples.strangers.cache(range(len(samples.strangers)))


def free_encoders(family: Family, pipeline: Any, keep_vae: bool) -> None:
    """Free what has done its work: text encoders, and the VAE where neither latents nor samples need it."""
    for name in family.frozen_components:
        if not (name == "vae" and keep_vae):
            setattr(pipeline, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pair_batches(
    settings: Settings,
    method: Method,
    training_set: TrainingSet,
    samples: Samples,
    sampler: WindowSampler,
    timestep_range: tuple[int, int],
    num_timesteps: int,
    in_subprocesses: bool,
):
    """Return an endless iterator over the micro-batches of this process, as the tensors of a `Query`."""
    density = timestep_density(
        settings.weighting_scheme, num_timesteps, settings.logit_mean, settings.logit_std, settings.mode_scale
    )
    pairs = PairDataset(
        samples.keep,
        samples.forget,
        training_set.split.order,
        method,
        sampler.num_pairs,
        timestep_range,
        settings.seed,
        samples.neighbors,
        samples.keep_conditions,
        samples.forget_conditions,
        None if density is None else density.numpy(),
    )
    return iter(window_loader(pairs, sampler, settings.dataloader_num_workers if in_subprocesses else 0))

"""Measure how strongly a text-to-image model memorized an image for a prompt, on samples of that prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siss_diffusers.curation import sample_prompt
from siss_diffusers.data.folders import cure_of_data
from siss_diffusers.data.images import ImageTransform, count_pictures
from siss_diffusers.data.listing import describe_passed_over, list_folder, refuse_archives
from siss_diffusers.data.saved import is_saved
from siss_diffusers.data.viewing import read_image
from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.families import Family, Sampling
from siss_diffusers.metrics.broken import broken
from siss_diffusers.metrics.noise_norm import NOT_IN_ONE_BATCH, TextNoiseNorms, first_noise_norm, mean_noise_norm
from siss_diffusers.similarity import correlation, for_detectors


@dataclass(frozen=True)
class TrainingImages:
    """Images among which the best match of a prompt's samples is looked for.

    Args:
        names: of their files.
        pictures: `(N, 3, H, W)` in [0, 1], at the size at which copies are looked for.
        passed_over: how many files of what kind were not read, as a text; empty for none.
    """

    names: Sequence[str]
    pictures: Tensor
    passed_over: str = ""

    def best_match(self, samples: Tensor) -> tuple[float, str]:
        """Return the highest correlation of a sample `(N, 3, H, W)` with a training image, and the name of its file."""
        small = for_detectors(samples)
        # One training image at a time, because its shifted copies take memory.
        scores = torch.stack([correlation(small, picture[None]).max() for picture in self.pictures])
        return scores.max().item(), self.names[int(scores.argmax())]


def load_training_images(folder: str, resolution: int, flag: str = "--train_data_dir") -> TrainingImages:
    """Load all images in a folder as training would see them.

    Args:
        resolution: side of the images in training, in pixels.
        flag: where the folder comes from, for messages.

    Raises:
        UsageError: for a folder without images, or an image that cannot be read.
    """
    if is_saved(folder):
        raise UsageError(
            f"{flag}: {folder} is a data set of save_to_disk, and files of images are needed here; save its images as files"
        )
    files = list_folder(flag, folder)
    refuse_archives(flag, files)
    if not files.images:
        inside = describe_passed_over(files)
        raise UsageError(
            f"{flag}: no images in {folder}" + (f", only {inside}{cure_of_data('', files)}" if inside else "")
        )
    names = [Path(file).relative_to(files.root).as_posix() for file in files.images]
    pictures, several = read_pictures(flag, files.images, resolution)
    passed_over = [describe_passed_over(files)]
    if several:
        passed_over.append(
            f"all but the first picture of {len(several)} files that hold several ({files.examples(several)})"
        )
    return TrainingImages(names, pictures, ", ".join(filter(None, passed_over)))


def load_references(
    references: Mapping[str, Sequence[Path]], resolution: int, flag: str = "--reference_column"
) -> dict[str, TrainingImages]:
    """Load the images that prompts are said to reproduce, for each prompt.

    Raises:
        UsageError: for an image that cannot be read, or a file that holds several.
    """
    loaded = {}
    for prompt, files in references.items():
        pictures, several = read_pictures(flag, files, resolution)
        if several:
            raise UsageError(
                f"{flag}: {several[0]} holds several pictures; name a file that holds the one that is meant"
            )
        loaded[prompt] = TrainingImages([file.name for file in files], pictures)
    return loaded


def read_pictures(flag: str, files: Sequence[str | Path], resolution: int) -> tuple[Tensor, list[str | Path]]:
    """Read images as training would see them.

    Returns:
        `(N, 3, H, W)` in [0, 1], at the size at which copies are looked for, and the files that hold several pictures.

    Raises:
        UsageError: for an image that cannot be read.
    """
    transform = ImageTransform(channels=3, resolution=resolution, center_crop=True, random_flip=False)
    pictures, several = [], []
    for file in files:
        try:
            pictures.append(for_detectors(transform(read_image(file))[None] / 2 + 0.5)[0])
            if count_pictures(file) > 1:
                several.append(file)
        except Exception as error:  # Pillow does not say how it fails where the second picture is damaged
            raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it")
    return torch.stack(pictures), several


def self_similarity(images: Tensor) -> float | None:
    """Return how alike the samples of a prompt are: 1 for copies of one picture, about 1 - sqrt(2) for unrelated ones.

    It is 1 minus the lower quartile of their pixel distances to each other, divided by their mean contrast (the distance
    to their own mean brightness). The quartile sees a picture that half of the samples are, however different the others
    are. A correlation is less suited: pictures of one kind, all digits, correlate by 0.9 without being copies.

    Args:
        images: `(N, C, H, W)`.

    Returns:
        None for a single sample.
    """
    if len(images) < 2:
        return None
    distances = torch.pdist(images.flatten(1))
    contrast = (images - images.mean(dim=(2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
    return (1 - distances.quantile(0.25) / contrast.clamp(min=1e-6)).item()


def measure_prompt(
    family: Family,
    pipeline: Any,
    prompt: str,
    num_samples: int,
    sampling: Sampling,
    training: TrainingImages | None = None,
) -> tuple[dict[str, float | str | None], Tensor]:
    """Sample a prompt and measure how strongly an image was memorized for it.

    Samples that are no pictures are counted as `broken`, and the figures are those of the others: a black picture is no
    memorized one, and one that is not finite is no sign of the contrary.

    Args:
        sampling: its guidance scale must be above 1, or there is no noise norm.
        training: images among which the best match is looked for.

    Returns:
        The figures by their names, None if one is not finite or cannot be measured; `no_noise_norm`, the reason, if there
        is no noise norm; and the samples `(num_samples, C, H, W)` in [0, 1].
    """
    with TextNoiseNorms(family.network(pipeline), family.path(pipeline)) as norms:
        samples = sample_prompt(family, pipeline, prompt, num_samples, sampling)
    is_broken = broken(samples)
    measured = samples[~is_broken]
    figures: dict[str, float | str | None] = {
        "broken": int(is_broken.sum()),
        "self_similarity": self_similarity(measured),
        "noise_norm": None,
        "noise_norm_first": None,
    }
    if norms.passes:
        per_step = norms.per_step()[:, ~is_broken]
        figures["noise_norm"] = mean_noise_norm(per_step).mean().item()
        figures["noise_norm_first"] = first_noise_norm(per_step).mean().item()
    else:
        figures["no_noise_norm"] = NOT_IN_ONE_BATCH
    if training is not None:
        figures["best_match"], figures["best_match_file"] = None, None
        if len(measured):
            figures["best_match"], figures["best_match_file"] = training.best_match(measured)
    for name, figure in figures.items():
        if isinstance(figure, float) and not isfinite(figure):
            figures[name] = None  # half precision overflows
    return figures, samples

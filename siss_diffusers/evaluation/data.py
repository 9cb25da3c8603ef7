"""The pictures and prompts that models are measured with."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.data.captions import load_captions, same_captions
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.sources import load_image_rows
from siss_diffusers.data.split import GivenRows, split_data
from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.families import Family
from siss_diffusers.metrics.copies import MAX_KEEP_IMAGES


MAX_ORDINARY_PROMPTS = 64
SPARE_CONTROLS = 16  # never seen pictures that are read beyond those that are attacked


@dataclass(frozen=True)
class EvaluationData:
    """Pictures `(N, C, H, W)` float32 in [0, 1], on the CPU, and their prompts.

    A model without prompts has a single empty one, so that both kinds of model are treated alike.

    Args:
        forget: the forget images, each different one once.
        keep: images to keep; those with a prompt of a forget image, if there are any.
        prompts: the memorized prompts, those of the forget images.
        forget_prompts: `(K,)`, the number in `prompts` of each forget image.
        keep_prompts: `(M,)`, the number in `prompts` of each image of `keep`; None if they have other prompts.
        ordinary_prompts: other prompts of images to keep.
        ordinary_images: images to keep that ordinary samples are compared with; None if nothing compares them.
        never_seen: pictures that the model was not trained on; None where none were given.
        prompt_classes: the number of the class that an ordinary prompt asks for, for the accuracy of a classifier.
    """

    forget: Tensor
    keep: Tensor
    prompts: Sequence[str]
    forget_prompts: Tensor
    keep_prompts: Tensor | None
    ordinary_prompts: Sequence[str] = ()
    ordinary_images: Tensor | None = None
    never_seen: Tensor | None = None
    prompt_classes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def without_prompts(cls, forget: Tensor, keep: Tensor) -> "EvaluationData":
        """Return the data of a model that has no prompts.

        Args:
            forget: the forget images, each different one once.
            keep: images to keep.
        """
        numbers = torch.zeros(len(forget), dtype=torch.long), torch.zeros(len(keep), dtype=torch.long)
        return cls(forget, keep, ("",), *numbers, ordinary_images=keep)


@dataclass(frozen=True)
class SplitData:
    """The images to keep and to forget, as training splits them, and their prompts.

    Args:
        keep, forget: the data sets.
        keep_prompts, forget_prompts: the prompt of each image; None for models without prompts.
        counts: the numbers of images.
    """

    keep: Images
    forget: Images
    keep_prompts: list[str] | None
    forget_prompts: list[str] | None
    counts: dict[str, int]


def split_to_measure(
    given: GivenRows, family: Family, *, seed: int, drop_near_duplicates: bool, caption_column: str | None
) -> SplitData:
    """Split data as training does, and read the prompts. Pictures are read without anything random, and of a large set no
    more than are used: a million would take hours.

    Args:
        caption_column: of the prompts; models without prompts need none.

    Raises:
        UsageError: for data that cannot be used, or a prompt that is missing.
    """
    transform = ImageTransform(channels=family.channels, resolution=family.resolution, center_crop=True)
    split = split_data(given, transform, seed, MAX_KEEP_IMAGES, drop_near_duplicates=drop_near_duplicates)
    rows, keep_prompts, forget_prompts = set(split.order.drawn.tolist()), None, None
    if family.has_prompts:
        forget_prompts = load_captions(split.forget, caption_column).to_pylist()
        captions = load_captions(split.train, caption_column, split.order.drawn)
        # Images to keep of the memorized prompts, which may be few among many.
        rows |= set(split.order.first(MAX_KEEP_IMAGES, same_captions(captions, forget_prompts)))
    keep = split.train.select(sorted(rows))
    if family.has_prompts:
        keep_prompts = load_captions(keep, caption_column).to_pylist()
    return SplitData(keep, split.forget, keep_prompts, forget_prompts, split.counts())


def collect_data(
    keep: Images,
    forget: Images,
    keep_prompts: Sequence[str] | None = None,
    forget_prompts: Sequence[str] | None = None,
    *,
    num_samples: int,
    with_ordinary_images: bool,
    seed: int = 0,
) -> EvaluationData:
    """Choose and read what models are measured with.

    Args:
        keep, forget: the data sets; forget images that are equal count once.
        keep_prompts, forget_prompts: the prompt of each image; None for models without prompts.
        num_samples: samples of the memorized prompts, at least one for each of them.
        with_ordinary_images: whether to read images to keep of ordinary prompts.
        seed: of the choice among the images to keep.

    Raises:
        UsageError: for an image that cannot be read, or for too few samples.
    """
    different = unique_images(forget)
    shuffle = np.random.default_rng(seed).permutation
    if keep_prompts is None or forget_prompts is None:
        chosen = shuffle(len(keep))[:MAX_KEEP_IMAGES].tolist()
        return EvaluationData.without_prompts(load_pictures(forget, different), load_pictures(keep, chosen))

    prompts = sorted(set(forget_prompts))
    if num_samples < len(prompts):
        raise UsageError(f"--num_samples must be at least {len(prompts)}, the prompts of the forget images")
    number = {prompt: index for index, prompt in enumerate(prompts)}
    memorized = [index for index, prompt in enumerate(keep_prompts) if prompt in number]
    chosen = shuffle(memorized or list(range(len(keep))))[:MAX_KEEP_IMAGES].tolist()
    # The most frequent ones first, so that a few samples are of what matters.
    counts = Counter(prompt for prompt in keep_prompts if prompt not in number)
    ordinary = [prompt for prompt, _ in counts.most_common(MAX_ORDINARY_PROMPTS)]
    ordinary_images = None
    if with_ordinary_images and ordinary:
        rows = [index for index, prompt in enumerate(keep_prompts) if prompt in set(ordinary)]
        chosen_ordinary = np.random.default_rng(seed).permutation(rows)[:MAX_KEEP_IMAGES].tolist()
        ordinary_images = load_pictures(keep, chosen_ordinary)
    return EvaluationData(
        forget=load_pictures(forget, different),
        keep=load_pictures(keep, chosen),
        prompts=prompts,
        forget_prompts=torch.tensor([number[forget_prompts[index]] for index in different]),
        keep_prompts=torch.tensor([number[keep_prompts[index]] for index in chosen]) if memorized else None,
        ordinary_prompts=ordinary,
        ordinary_images=ordinary_images,
    )


def unique_images(images: Images) -> list[int]:
    """Return the rows of different pictures, in their order: a memorized image is often in the forget set many times."""
    rows = {images.digest(index): index for index in reversed(range(len(images)))}
    return sorted(rows.values())


def load_pictures(images: Images, rows: Sequence[int]) -> Tensor:
    """Read pictures, `(N, C, H, W)` in [0, 1]."""
    # In place: 2,000 pictures of 512 pixels take 6 GB, and there may be no room for them twice.
    pictures = torch.empty(len(rows), *images.load(rows[0]).shape)
    for place, index in enumerate(rows):
        pictures[place] = images.load(index)
    return pictures.div_(2).add_(0.5)


def load_never_seen(settings: EvaluationSettings, family: Family) -> Tensor:
    """Read pictures that the model never saw, `(N, C, H, W)` in [0, 1]: a few more than are used, for a detector may take one
    for a forget image.

    Raises:
        UsageError: for a folder that is not there or holds no image, or an image that cannot be read.
    """
    rows = load_image_rows(
        "--never_seen_dir", settings.never_seen_dir, "image", is_folder=True, cache_dir=settings.cache_dir
    )
    images = rows.images(ImageTransform(family.channels, family.resolution, center_crop=True))
    return load_pictures(images, unique_images(images)[: SPARE_CONTROLS + settings.attack_controls])

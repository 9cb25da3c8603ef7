"""Tell the samples that are copies of a memorized picture from the other samples of its prompt.

Follows the data collection of the SISS paper (Alberti et al., arXiv 2503.01034): sample the prompt, split the samples into
clusters, and mark the cluster of copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from siss_diffusers.data.viewing import to_channels
from siss_diffusers.distributed import on_all_processes, on_main_process
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Family, Sampling
from siss_diffusers.metrics.base import NO_PICTURE
from siss_diffusers.metrics.broken import broken
from siss_diffusers.metrics.clusters import memorized_cluster, split_clusters
from siss_diffusers.metrics.features import pixel_features


@dataclass(frozen=True)
class Clustering:
    """How samples are split into copies and others.

    Args:
        num_clusters: of k-means; at least 2.
        min_silhouette: samples whose clusters have a lower mean silhouette are not split.
        features: from pictures `(N, 3, H, W)` in [0, 1] to features `(N, D)`, which are compared by their distance.
        seed: of k-means.
    """

    num_clusters: int = 2
    min_silhouette: float = 0.25
    features: Callable[[Tensor], Tensor] = pixel_features
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """Samples of a prompt, split.

    Args:
        is_copy: `(N,)` bool, which samples are copies of the memorized picture; none if the clusters are not separated.
        silhouette: of the clusters, in [-1, 1]; None if there is only one.
        separated: whether the clusters are far enough apart to tell copies from other samples.
    """

    is_copy: Tensor
    silhouette: float | None
    separated: bool


def sample_prompt(family: Family, pipeline: Any, prompt: str, count: int, sampling: Sampling) -> Tensor:
    """Draw samples of one prompt.

    Returns:
        `(count, C, H, W)` float32 in [0, 1], on the CPU; sample i is of seed `sampling.seed + i`.
    """
    condition = family.embed(pipeline, [prompt])
    return family.sample(pipeline, condition[[0] * count], family.embed(pipeline, [""]), sampling)


def split_samples(samples: Tensor, references: Sequence[Tensor] = (), clustering: Clustering | None = None) -> Split:
    """Split samples into clusters and mark the copies of the memorized picture.

    With references, each marks the cluster whose center is nearest to it. Without, the tightest cluster is marked.

    Args:
        samples: `(N, 3, H, W)` in [0, 1].
        references: pictures `(3, H, W)` in [0, 1] of what was memorized, of any size.
        clustering: `Clustering()` by default.
    """
    clustering = clustering or Clustering()
    features = clustering.features(samples)
    labels, silhouette = split_clusters(features, clustering.num_clusters, clustering.seed)
    # If all clusters but one are single pictures, k-means has only set outliers apart.
    has_two_clusters = int((labels.bincount() > 1).sum()) > 1
    if silhouette is None or silhouette < clustering.min_silhouette or not has_two_clusters:
        return Split(torch.zeros(len(samples), dtype=torch.bool), silhouette, separated=False)
    memorized = [
        memorized_cluster(features, labels, clustering.features(resize_to(samples, reference))[0])
        for reference in references
    ]
    memorized = memorized or [memorized_cluster(features, labels)]
    return Split(torch.isin(labels, torch.tensor(memorized)), silhouette, separated=True)


def resize_to(samples: Tensor, picture: Tensor) -> Tensor:
    """Return a picture `(C, h, w)` as `(1, C, H, W)`, at the size of samples `(N, C, H, W)`."""
    return F.interpolate(picture[None], samples.shape[-2:], mode="bilinear", antialias=True, align_corners=False)


def sample_keep_images(
    family: Family,
    pipeline: Any,
    prompt: str,
    references: Sequence[Image.Image] = (),
    *,
    num_images: int = 128,
    sampling: Sampling | None = None,
    clustering: Clustering | None = None,
) -> list[Image.Image]:
    """Sample a prompt and return the samples that are not the memorized picture, as images to keep.

    The processes of a launch share the work, and all of them return the same pictures. They are those that
    `siss curate` writes for the same settings.

    Args:
        references: pictures of what was memorized; without any, the tightest cluster of samples counts as the copies.
        num_images: how many samples are drawn.
        sampling: `Sampling()` by default.
        clustering: `Clustering()` by default.

    Raises:
        UsageError: if the samples do not fall into clusters, or all of them are copies.
    """
    sampling = sampling or Sampling()

    def draw_batch(start: int) -> list[Image.Image]:
        count = min(sampling.batch_size, num_images - start)
        batch = sample_prompt(family, pipeline, prompt, count, replace(sampling, seed=sampling.seed + start))
        # 8 bits, as in a file. What is no picture is nothing to keep.
        return [to_pil_image(sample) for sample in batch[~broken(batch)]]

    def find_copies() -> list[bool]:
        pictures = torch.stack([to_tensor(sample) for sample in samples])
        if len(pictures) == 0:
            raise UsageError(
                f"all {num_images} samples of the prompt are broken ({NO_PICTURE}); give the images to keep, or check the"
                " pipeline"
            )
        split = split_samples(pictures, [to_tensor(to_channels(image, 3)) for image in references], clustering)
        if not split.separated or split.is_copy.all():
            figure = "undefined" if split.silhouette is None else f"{split.silhouette:.2f}"
            raise UsageError(
                f"the {num_images} samples of the prompt do not fall into copies of what was memorized and other"
                f" pictures (silhouette {figure}); give the images to keep"
            )
        return split.is_copy.tolist()

    batches = on_all_processes(draw_batch, range(0, num_images, sampling.batch_size), "Sampling images to keep")
    samples = [sample for batch in batches for sample in batch]
    is_copy = on_main_process(find_copies)
    return [sample for sample, copy in zip(samples, is_copy) if not copy]

"""All copy detectors of an evaluation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.metrics.broken import finite
from siss_diffusers.metrics.clusters import CopyCluster
from siss_diffusers.metrics.copies import CopyDetectors, halfway_to_copy
from siss_diffusers.metrics.damage import damaged
from siss_diffusers.metrics.features import copy_similarity, pixel_features
from siss_diffusers.similarity import for_detectors


MIN_SILHOUETTE = 0.25  # below, k-means has split what is one cluster
MAX_DAMAGED = 16  # forget images that are shown damaged to the detectors
MISSES_IMAGES = "it does not flag every forgotten image itself, undamaged: an image to keep looks the same to it, or it sees nothing there"


class Detectors:
    """Flags copies by every detector in use. Thresholds are calibrated so that no image to keep is flagged.

    Args:
        references: the forget images, `(K, C, H, W)` in [0, 1].
        keep: images to keep, `(M, C, H, W)` in [0, 1].
        copy_features: features of a copy-detection network, in which copies are close by cosine; None for none.

    Attributes:
        settings: thresholds by detector, for `evaluation.json`.
        blind: why a detector misses a forget image that nothing was done to, by detector. What it flags is a copy still.
    """

    def __init__(
        self, references: Tensor, keep: Tensor, copy_features: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.references, self.keep = references, keep
        self.by_pixels = CopyDetectors.calibrated(references, keep)
        self.settings: dict[str, dict[str, float]] = {
            "pixel_l2": {"threshold": self.by_pixels.max_distance},
            "correlation": {"threshold": self.by_pixels.min_correlation},
        }
        self.clusters: CopyCluster | None = None
        self.copy_features = copy_features
        if copy_features is not None:
            self.reference_features = copy_features(references)
            highest = copy_similarity(copy_features(keep), self.reference_features).max().item()
            self.min_similarity = halfway_to_copy(highest)
            self.settings["network"] = {"threshold": self.min_similarity}
        found = self.flags(references)
        self.blind = {
            detector: MISSES_IMAGES for detector, flag in found.items() if detector != "any" and not flag.all()
        }

    def for_image(self, picture: Tensor) -> "Detectors":
        """Return the same kinds of detectors, but the clusters, for another picture `(C, H, W)` in [0, 1].

        They are never laxer than these: an image unlike all that is kept would have a threshold that much else passes.
        """
        other = Detectors(picture[None], self.keep, self.copy_features)
        other.by_pixels = replace(
            other.by_pixels,
            max_distance=min(self.by_pixels.max_distance, other.by_pixels.max_distance),
            min_correlation=max(self.by_pixels.min_correlation, other.by_pixels.min_correlation),
        )
        if self.copy_features is not None:
            other.min_similarity = max(self.min_similarity, other.min_similarity)
        return other

    def similarity(self, images: Tensor) -> Tensor | None:
        """Return the cosine `(N,)` to the nearest forget image in the features of the network; None without one."""
        if self.copy_features is None:
            return None
        return copy_similarity(self.copy_features(images), self.reference_features)

    def add_clusters(self, samples: Tensor, seed: int) -> str | None:
        """Add k-means on the base's samples as a detector, as in the SISS paper.

        Returns:
            The reason why it cannot tell copies from the rest; None if it was added.
        """
        features = pixel_features(for_detectors(samples[finite(samples)]))
        clusters = CopyCluster.fit(features, pixel_features(self.by_pixels.references), seed=seed)
        if clusters is None or clusters.silhouette < MIN_SILHOUETTE:
            return "the base's samples do not fall into two clusters, one of them that of the forget images"
        flagged = clusters.flags(pixel_features(for_detectors(self.keep))).float().mean().item()
        if flagged > 0:
            return f"the memorized cluster also takes {100 * flagged:.1f} % of the images to keep"
        self.clusters = clusters
        self.settings["cluster"] = {"silhouette": clusters.silhouette}
        return None

    def flags(self, images: Tensor) -> dict[str, Tensor]:
        """Return for each detector which images `(N, C, H, W)` in [0, 1] are copies, `(N,)` bool; `any` joins them."""
        flags = self.by_pixels.flags(images)
        del flags["any"]
        if self.copy_features is not None:
            flags["network"] = torch.zeros(len(images), dtype=torch.bool)
            if (measured := finite(images)).any():
                flags["network"][measured] = self.similarity(images[measured]) > self.min_similarity
        if self.clusters is not None:
            flags["cluster"] = self.clusters.flags(pixel_features(for_detectors(images)))
        return flags | {"any": torch.stack(list(flags.values())).any(0)}

    @property
    def are_blind(self) -> bool:
        """Whether they miss a forget image itself, because an image to keep looks the same."""
        return not self.flags(self.references)["any"].all()

    def damage_table(self, seed: int) -> dict[str, dict[str, float]]:
        """Return for each detector and kind of damage the share of damaged forget images that it still flags.

        Args:
            seed: of the noise that is one of the damages.
        """
        hits: dict[str, dict[str, list[bool]]] = {}
        for index, reference in enumerate(self.references[:MAX_DAMAGED]):
            for damage, image in {"none": reference, **damaged(reference, seed + index)}.items():
                for detector, flag in self.flags(image[None]).items():
                    hits.setdefault(detector, {}).setdefault(damage, []).append(bool(flag))
        return {
            detector: {damage: float(np.mean(row)) for damage, row in table.items()}
            for detector, table in hits.items()
        }

    def keep_flagged(self) -> dict[str, float]:
        """Return for each detector the share of the images to keep that it flags, which should be 0."""
        return {detector: flags.float().mean().item() for detector, flags in self.flags(self.keep).items()}

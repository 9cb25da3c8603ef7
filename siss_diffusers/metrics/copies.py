"""Which samples are copies of a forget image: a damaged copy is still a copy, so any detector may flag it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siss_diffusers.metrics.base import ALL_BROKEN, NO_PROMPTS, Metric, Skip, not_empty
from siss_diffusers.metrics.formats import four_digits, percent, short_number
from siss_diffusers.similarity import correlation, for_detectors, pixel_l2


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

# Thresholds are calibrated on at most this many of the images to keep.
MAX_KEEP_IMAGES = 2_000
# Of a cosine in float32.
ROUNDING = 1e-5

# What makes each detector flag a sample, for people. Keys as in `evaluation.json`.
DETECTORS = {
    "pixel_l2": "The pixels are nearer to a forgotten image than a threshold",
    "correlation": "The picture correlates with a forgotten image, whatever its brightness and contrast",
    "network": "A copy-detection network finds the picture similar to a forgotten image",
    "sscd": "The copy-detection network SSCD finds the picture similar to a forgotten image",
    "cluster": "The picture falls into the base's cluster of copies",
    "any": "At least one detector flags the picture. The report calls such a picture a copy",
}


def halfway_to_copy(highest: float) -> float:
    """Return the threshold of a cosine halfway between a perfect copy and the image to keep that looks most like one; above
    both where they differ by rounding alone, which would flag either of them by chance."""
    return (1 + highest) / 2 if highest < 1 - ROUNDING else 1 + ROUNDING


@dataclass(frozen=True)
class CopyDetectors:
    """Pixel L2 and correlation with thresholds for one forget set; made by `calibrated`.

    Args:
        references: the forget images, `(K, C, H, W)` in [0, 1], at the size of `for_detectors`.
        max_distance: a sample nearer than this is a copy.
        min_correlation: a sample that correlates more than this is a copy.
    """

    references: Tensor
    max_distance: float
    min_correlation: float

    @classmethod
    def calibrated(cls, references: Tensor, keep: Tensor) -> "CopyDetectors":
        """Return detectors with thresholds halfway between a perfect copy and the keep image that looks most like one.

        So no keep image is flagged, and new pictures like them are not either.

        Args:
            references: the forget images, `(K, C, H, W)` in [0, 1].
            keep: images to keep, `(M, C, H, W)` in [0, 1].

        Raises:
            ValueError: where a set is empty.
        """
        if len(references) == 0 or len(keep) == 0:
            raise ValueError(f"{len(references)} images to forget and {len(keep)} to keep: both sets need an image")
        references, keep = for_detectors(references), for_detectors(keep)
        return cls(
            references=references,
            max_distance=pixel_l2(keep, references).min().item() / 2,
            min_correlation=halfway_to_copy(correlation(keep, references).max().item()),
        )

    @property
    def are_blind(self) -> bool:
        """Whether they miss a forget image itself, because an image to keep looks the same: their silence means
        nothing then."""
        return not self.flags(self.references)["any"].all()

    def flags(self, samples: Tensor) -> dict[str, Tensor]:
        """Return for each detector which samples `(N, C, H, W)` in [0, 1] are copies, `(N,)` bool; `any` joins them.

        A sample that is not finite is no copy, and not forgotten either: see `metrics.broken`.
        """
        samples = for_detectors(samples)
        flags = {
            "pixel_l2": pixel_l2(samples, self.references) < self.max_distance,
            "correlation": correlation(samples, self.references) > self.min_correlation,
        }
        return flags | {"any": torch.stack(list(flags.values())).any(0)}


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson, JASA 1927), 95 % by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(center - half, 0.0)
    high = 1.0 if successes == trials else min(center + half, 1.0)
    return low, high


def copy_statistics(flags: dict[str, Tensor], broken: Tensor | None = None) -> dict[str, Any]:
    """Return the copy entries of `evaluation.json`. Without a sample that can be judged, the share of copies is None.

    Args:
        flags: of `CopyDetectors.flags`.
        broken: which samples are no pictures, `(N,)` bool, from `metrics.broken`; they are counted by themselves.
    """
    is_copy, samples = flags["any"], len(flags["any"])
    broken = torch.zeros(samples, dtype=torch.bool) if broken is None else broken & ~is_copy
    copies, judged = int(is_copy.sum()), int((~broken).sum())
    low, high = wilson_interval(copies, judged)

    def share(flag: Tensor) -> float | None:
        return flag[~broken].float().mean().item() if judged else None

    return {
        "samples": samples,
        "broken_share": broken.float().mean().item() if samples else None,
        "copy_share": copies / judged if judged else None,
        "copy_share_low": low,
        "copy_share_high": high,
        "copy_share_by_detector": {name: share(flag) for name, flag in flags.items() if name != "any"},
    }


def _samples(model: "MeasuredModel") -> dict[str, int]:
    return {"samples": len(model.samples)}


def _copy_share(model: "MeasuredModel") -> dict[str, Any]:
    statistics = model.count_copies(model.samples)
    if statistics["copy_share"] is None:
        raise Skip(ALL_BROKEN)
    return statistics


def _others(model: "MeasuredModel") -> dict[str, int]:
    return {"others": len(model.others)}


def _others_distance_to_keep(model: "MeasuredModel") -> dict[str, float]:
    others = not_empty(model.others)
    distance = pixel_l2(for_detectors(others), for_detectors(model.data.keep))
    return {"others_distance_to_keep": distance.median().item()}


def _ordinary_copy_share(model: "MeasuredModel") -> dict[str, float]:
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    share = model.count_copies(model.ordinary_samples)["copy_share"]
    if share is None:
        raise Skip(ALL_BROKEN)
    return {"ordinary_copy_share": share}


SAMPLES = Metric(
    key="samples",
    label="Samples",
    explanation="Pictures drawn from each model to count copies in. The more, the narrower the interval.",
    measure=_samples,
    format=short_number,
    chapter="copies",
)
COPY_SHARE = Metric(
    key="copy_share",
    label="Copies",
    explanation=(
        "Share of the samples that any detector flags as a copy of a forgotten image, with its 95 % interval. Lower is"
        " better."
    ),
    measure=_copy_share,
    format=percent,
    better="lower",
    chapter="copies",
)
OTHERS = Metric(
    key="others",
    label="Samples that are no copies",
    explanation="What the next figures are taken from.",
    measure=_others,
    format=short_number,
    chapter="instead",
)
OTHERS_DISTANCE_TO_KEEP = Metric(
    key="others_distance_to_keep",
    label="Distance of these to images to keep",
    explanation=(
        "Median pixel distance of a sample that is no copy to the nearest image to keep. Lower is better: something"
        " like the data comes instead; far above the base points to noise or broken pictures."
    ),
    measure=_others_distance_to_keep,
    format=four_digits,
    better="lower",
    chapter="instead",
)
ORDINARY_COPY_SHARE = Metric(
    key="ordinary_copy_share",
    label="Copies under ordinary prompts",
    explanation="Share of the samples of other prompts that a detector flags. Lower is better.",
    measure=_ordinary_copy_share,
    format=percent,
    better="lower",
    chapter="copies",
)

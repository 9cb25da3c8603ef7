"""Samples that are no pictures: what cannot be looked at must not count as forgotten."""

from typing import TYPE_CHECKING

from torch import Tensor

from siss_diffusers.metrics.base import NO_PICTURE, NO_PROMPTS, Metric, Skip
from siss_diffusers.metrics.formats import percent


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

# Least difference of the brightest and the darkest value of some channel, and least brightest value, of a picture.
MIN_CONTRAST, MIN_BRIGHTEST = 2 / 255, 8 / 255


def finite(samples: Tensor) -> Tensor:
    """Return which samples `(N, C, H, W)` hold numbers alone, `(N,)` bool."""
    return samples.flatten(1).isfinite().all(1)


def broken(samples: Tensor) -> Tensor:
    """Return which samples `(N, C, H, W)` in [0, 1] are not finite, of one colour, or black, `(N,)` bool."""
    numbers = samples.nan_to_num(0, 0, 0).flatten(2)
    highest, lowest = numbers.amax(2), numbers.amin(2)
    is_flat = ((highest - lowest) < MIN_CONTRAST).all(1)
    return ~finite(samples) | is_flat | (highest < MIN_BRIGHTEST).all(1)


def _broken_share(model: "MeasuredModel") -> dict[str, float]:
    return {"broken_share": (model.broken & ~model.flags["any"]).float().mean().item()}


def _ordinary_broken_share(model: "MeasuredModel") -> dict[str, float]:
    if not model.family.has_prompts:
        raise Skip(NO_PROMPTS)
    return {"ordinary_broken_share": model.ordinary_broken.float().mean().item()}


BROKEN_SHARE = Metric(
    key="broken_share",
    label="Broken samples",
    explanation=(
        f"Share of the samples that are no pictures: {NO_PICTURE}. They are neither copies nor"
        " forgotten, and the share of copies is that of the others. Lower is better: a model that makes them is ruined."
    ),
    measure=_broken_share,
    format=percent,
    better="lower",
    chapter="copies",
)
ORDINARY_BROKEN_SHARE = Metric(
    key="ordinary_broken_share",
    label="Broken samples under ordinary prompts",
    explanation="Share of the samples of other prompts that are no pictures. Lower is better.",
    measure=_ordinary_broken_share,
    format=percent,
    better="lower",
    chapter="rest",
)

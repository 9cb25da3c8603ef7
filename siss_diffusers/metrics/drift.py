"""How far ordinary samples have moved from those of the base."""

from typing import TYPE_CHECKING

from torch import Tensor

from siss_diffusers.metrics.base import Metric, Skip


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


def drift(before: Tensor, after: Tensor) -> float:
    """Return the median distance of two samples of one seed, relative to the contrast of the first.

    It is 0 for the same pictures and about sqrt(2) for unrelated ones. A picture that is not finite is infinitely far.

    Args:
        before, after: `(N, C, H, W)` in [0, 1], N at least 1.
    """
    contrast = (before - before.mean(dim=(2, 3), keepdim=True)).flatten(1).norm(dim=1)
    distances = (after - before).flatten(1).norm(dim=1) / contrast.clamp(min=1e-6)
    return distances.nan_to_num(nan=float("inf")).median().item()


def _drift(model: "MeasuredModel") -> dict[str, float]:
    after = model.ordinary_samples
    if model.base is None:
        return {}
    no_copies = ~model.base.ordinary_copies
    if not no_copies.any():
        raise Skip("every ordinary sample of the base is a copy")
    return {"drift": drift(model.base.ordinary_samples[no_copies], after[no_copies])}


DRIFT = Metric(
    key="drift",
    label="Drift of ordinary samples",
    explanation=(
        "Median distance of a sample from the base's of the same seed, relative to its contrast; of those that were no"
        " copies. Lower is better: 0 is the same picture, about 1.4 an unrelated one."
    ),
    measure=_drift,
    better="lower",
    chapter="rest",
)

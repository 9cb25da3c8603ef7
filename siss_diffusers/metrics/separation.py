"""How well a score tells positives from negatives: AUC and the true positives at few false ones, with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from siss_diffusers.metrics.copies import wilson_interval


Z = 1.959963984540054  # 95 %
FEW_FALSE_POSITIVES = 0.01


class Separation(NamedTuple):
    """AUC and the true positive rate at 1 % false positives, each with its 95 % interval."""

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


def separation(positives: Sequence[float], negatives: Sequence[float]) -> Separation:
    """Measure how well a score, higher for positives, tells them from negatives.

    Args:
        positives, negatives: scores, at least one of each. With fewer than 100 negatives, 1 % false positives means none.
    """
    value = auc(positives, negatives)
    threshold = threshold_at(negatives, FEW_FALSE_POSITIVES)
    hits = int((np.asarray(positives) > threshold).sum())
    tpr = wilson_interval(hits, len(positives))
    return Separation(value, *auc_interval(value, len(positives), len(negatives)), hits / len(positives), *tpr)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Return the share of pairs whose positive has the higher score; equal scores count half (Mann and Whitney)."""
    ordered = np.sort(negatives)
    below, not_above = np.searchsorted(ordered, positives, "left"), np.searchsorted(ordered, positives, "right")
    return float((below + not_above).mean() / (2 * len(ordered)))


def auc_interval(value: float, num_positives: int, num_negatives: int) -> tuple[float, float]:
    """Return the score interval of an AUC: all theta with |theta - value| <= Z s(theta), s by Hanley and McNeil (1982) with
    the mean of both numbers (Newcombe, *Statistics in Medicine* 25, 2006, method 5). It has a width at 1, too."""
    mean_number = (num_positives + num_negatives) / 2

    def too_far(theta: float) -> bool:
        spread = 1 + (mean_number - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(theta - value) > Z * np.sqrt(theta * (1 - theta) * spread / (num_positives * num_negatives))

    def edge(outside: float) -> float:
        if not too_far(outside):
            return outside
        inside = value
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if too_far(middle) else (outside, middle)
        return inside

    return edge(0.0), edge(1.0)


def threshold_at(negatives: Sequence[float], share: float) -> float:
    """Return the lowest of the negatives' scores that at most this share of them exceeds."""
    ordered = np.sort(negatives)[::-1]
    return float(ordered[int(share * len(ordered))])

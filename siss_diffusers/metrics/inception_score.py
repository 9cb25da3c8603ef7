"""The inception score (Salimans et al., arXiv 1606.03498) over the class probabilities of any classifier."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siss_diffusers.metrics.base import Metric, Skip


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

MAX_SPLITS = 10


def inception_score(probabilities: Tensor, splits: int = MAX_SPLITS) -> tuple[float, float]:
    """Return mean and standard deviation of `exp E KL(p(y|x) || p(y))` over `splits` parts of the samples.

    Args:
        probabilities: `(N, K)`, the classifier's p(y|x), N at least `splits`.
    """
    scores = []
    for part in probabilities.double().tensor_split(splits):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def _inception_score(model: "MeasuredModel") -> dict[str, float]:
    if model.networks.class_probabilities is None:
        raise Skip("needs --classifier, a TorchScript file")
    others = model.ordinary_others
    if len(others) == 0:
        raise Skip("too few samples that are no copies, and finite")
    probabilities = model.networks.class_probabilities(others)
    score, spread = inception_score(probabilities, splits=min(MAX_SPLITS, len(others)))
    return {"inception_score": score, "inception_score_std": spread}


INCEPTION_SCORE = Metric(
    key="inception_score",
    label="Inception score",
    explanation=(
        "How distinct and how varied a classifier finds the samples, copies removed. Higher is better; compare with"
        " the base only."
    ),
    measure=_inception_score,
    better="higher",
    chapter="rest",
    spread="inception_score_std",
)

"""The inception score (Salimans et al., arXiv 1606.03498) over the class probabilities of any classifier."""

import torch
from torch import Tensor


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """`exp E KL(p(y|x) || p(y))`, mean and standard deviation over `splits` parts of the samples.

    Args:
        probabilities: `(N, K)`, the classifier's p(y|x), N at least `splits`.
    """
    scores = []
    for part in probabilities.double().tensor_split(splits):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()

"""The importance weights of SISS (Alberti et al., arXiv 2503.01034), in closed form and in log space."""

import math

import torch
from torch import Tensor


# A smaller weight is zero by definition: rules that normalise by the norm of the forget gradient would otherwise blow
# a gradient made of 1e-15 weights up to a full step.
NEGLIGIBLE_WEIGHT = 1e-6


def log_density_ratio(
    keep: Tensor, forget: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, from_forget: Tensor
) -> Tensor:
    """`D = log q(m|a) - log q(m|x)` of the mixture sample `m`, from the noise that made it.

    With `r = alpha / sigma` and `d = x - a`, `D = -r (r |d|^2 / 2 + <eps, d>)` for `m = alpha x + sigma eps`, and
    `D = r (r |d|^2 / 2 - <eps, d>)` for `m = alpha a + sigma eps`. Nothing is divided by sigma but alpha, and no
    noise is recomputed from `m`, which would lose its low bits.

    Args:
        keep, forget, noise: x, a and eps, `(B, ...)`, any floating dtype; computed in float32.
        alpha, sigma: `(B,)`.
        from_forget: `(B,)` bool, whether m was made from a.

    Returns:
        `(B,)` float32; 0 where x = a, infinite (never NaN) where sigma = 0 and x differs from a.
    """
    difference = (keep.float() - forget.float()).flatten(1)
    squared_distance = difference.square().sum(1)
    inner = (noise.float().flatten(1) * difference).sum(1)
    r = alpha.float() / sigma.float()
    sign = torch.where(from_forget, 1.0, -1.0)
    log_ratio = sign * r * (r * squared_distance / 2 - sign * inner)
    return torch.where(squared_distance == 0, 0.0, log_ratio)


def importance_weights(log_ratio: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """`w_keep = q(m|x) / q_lambda(m|x,a)` and `w_forget = q(m|a) / q_lambda(m|x,a)`.

    `q_lambda = (1 - lam) q(m|x) + lam q(m|a)`, so that `(1 - lam) w_keep + lam w_forget = 1`.

    Args:
        log_ratio: `(B,)`, from `log_density_ratio`.
        lam: in [0, 1]. At 0 (1) the forget (keep) weight is unbounded and may be infinite; it is never NaN.

    Returns:
        two `(B,)` float32 tensors, in `[0, 1 / (1 - lam)]` and `[0, 1 / lam]`.

    Raises:
        ValueError: for a `lam` outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], not {lam}")
    log_ratio = log_ratio.float()
    if lam == 0:
        return torch.ones_like(log_ratio), log_ratio.exp()
    if lam == 1:
        return (-log_ratio).exp(), torch.ones_like(log_ratio)
    log_keep, log_forget = torch.tensor(math.log1p(-lam)), torch.tensor(math.log(lam))
    w_keep = torch.exp(-torch.logaddexp(log_keep, log_forget + log_ratio))
    w_forget = torch.exp(-torch.logaddexp(log_keep - log_ratio, log_forget))
    return w_keep, w_forget

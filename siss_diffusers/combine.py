"""How much of the forget gradient is subtracted: pure functions of three inner products.

A rule returns `(c_keep, c_forget)`; the step goes down `c_keep g_keep + c_forget g_forget`. Every rule falls back to
`(1, 0)`, the keep gradient alone, where a norm that it divides by, or compares with, is zero. The rule `fixed` looks
at no product: c is constant, one scalar loss `L_keep - c L_forget`, with `c = s k / (n - k)` for the paper's
superfactor s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple


class Products(NamedTuple):
    """Inner products of the two *global* gradients; losses are summed over pixels and averaged over pairs.

    Where the forget gradient is rescaled before the keep gradient exists (`norm`, and `fixed` with calibrated
    forgetting), the two products with it are unknown: NaN, or 0 where the window has no keep row at all.
    """

    keep_keep: float
    keep_forget: float
    forget_forget: float


def relative(products: Products, scale: float) -> tuple[float, float]:
    """`c = scale |g_k| / |g_f|`: the forget term is a fixed share of the keep gradient.

    The advice of the SISS paper (arXiv 2503.01034), 10 % of the naive deletion gradient, made automatic.
    """
    if products.keep_keep == 0 or products.forget_forget == 0:
        return 1.0, 0.0
    return 1.0, -scale * math.sqrt(products.keep_keep / products.forget_forget)


def norm(products: Products, scale: float) -> tuple[float, float]:
    """`c = scale / |g_f|`: the forget term has a fixed norm, the `scaling_norm` of the SISS paper's experiments."""
    if products.keep_keep == 0 or products.forget_forget == 0:
        return 1.0, 0.0
    return 1.0, -scale / math.sqrt(products.forget_forget)


def project(products: Products, scale: float) -> tuple[float, float]:
    """`c = scale |g_k| / |g_f|` of what of g_f does not act against g_k: the step goes down
    `g_k - c (g_f - max(0, <g_f, g_k> / <g_k, g_k>) g_k)`.

    The projection of conflicting gradients (Yu et al., *Gradient Surgery*, arXiv 2001.06782), of the forget term alone.
    """
    c_keep, c_forget = relative(products, scale)
    if c_forget == 0:
        return c_keep, c_forget
    return c_keep - c_forget * max(0.0, products.keep_forget / products.keep_keep), c_forget


def nash(products: Products) -> tuple[float, float]:
    """The Nash bargaining solution of MUNBa (Wu & Harandi, arXiv 2411.15537), which its closed form simplifies to.

    With `rho = -cos(g_k, g_f)` the cosine between the two descent directions g_k and -g_f, each direction is weighted
    by `1 / (norm sqrt(1 + rho))`. Opposite directions (`1 + rho < 1e-4`) have no bargain: (1, 0).
    """
    if products.keep_keep == 0 or products.forget_forget == 0:
        return 1.0, 0.0
    norm_keep, norm_forget = math.sqrt(products.keep_keep), math.sqrt(products.forget_forget)
    rho = -products.keep_forget / (norm_keep * norm_forget)
    if 1 + rho < 1e-4:
        return 1.0, 0.0
    return 1 / (norm_keep * math.sqrt(1 + rho)), -1 / (norm_forget * math.sqrt(1 + rho))


def erasediff(products: Products, eta: float) -> tuple[float, float]:
    """EraseDiff's rule (Wu et al., arXiv 2401.05779, as the baseline of arXiv 2503.01034): added, not subtracted."""
    if products.forget_forget == 0:
        return 1.0, 0.0
    return 1.0, max(eta - products.keep_forget / products.forget_forget, 0.0)


FORGET_SCALINGS = ("relative", "norm", "fixed", "nash", "project")
DEFAULT_SCALE = 0.1


@dataclass(frozen=True)
class Rule:
    """A function of the inner products, and what it needs to know of them, which decides what a step costs.

    Args:
        combine: from `Products` to `(c_keep, c_forget)`.
        needs: `products`: all three, so both gradients at once; `forget_norm`: so the forget gradient first;
            `nothing`: the coefficients are constant, so one scalar loss does.
    """

    combine: Callable[[Products], tuple[float, float]]
    needs: str = "products"

    def __call__(self, products: Products) -> tuple[float, float]:
        return self.combine(products)


def constant_rule(keep_coefficient: float, forget_coefficient: float) -> Rule:
    return Rule(lambda products: (keep_coefficient, forget_coefficient), needs="nothing")


def scaling_rule(name: str = "relative", scale: float | None = None) -> Rule:
    """Return a rule of the subtracted forget term, with its scale.

    Args:
        name: one of `FORGET_SCALINGS`.
        scale: not negative; None is 0.1 for `relative`, `fixed` and `project`. `norm` needs one, `nash` takes none.

    Raises:
        ValueError: for an unknown name, or a scale that the rule cannot use.
    """
    if name not in FORGET_SCALINGS:
        raise ValueError(f"unknown forget scaling {name!r}: one of {', '.join(FORGET_SCALINGS)}")
    if name == "nash":
        if scale is not None:
            raise ValueError("the forget scaling 'nash' takes no scale")
        return Rule(nash)
    if scale is None:
        if name == "norm":
            raise ValueError("the forget scaling 'norm' needs a scale (published runs use 5 to 750)")
        scale = DEFAULT_SCALE
    if not 0 <= scale < math.inf:
        raise ValueError(f"the forget scale must be a finite number not below 0, not {scale}")
    if name == "fixed":
        return constant_rule(1.0, -scale)
    if name == "norm":
        return Rule(partial(norm, scale=scale), needs="forget_norm")
    return Rule(partial(project if name == "project" else relative, scale=scale))

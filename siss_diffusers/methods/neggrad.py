import math
from dataclasses import dataclass

from siss_diffusers.combine import Rule, constant_rule
from siss_diffusers.methods.base import Method, Query, Rows


@dataclass(frozen=True)
class NegGrad(Method):
    """Gradient ascent on the forget set (Golatkar et al., arXiv 1911.04933), as the baseline of the SISS paper.

    Args:
        scale: s, the factor of the ascent.
    """

    scale: float = 1.0

    name = "neggrad"
    summary = "gradient ascent on the forget set"
    paper = (
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "https://arxiv.org/abs/1911.04933",
    )
    subtracts_forget = True
    learns_keep = False
    has_both_sides = False

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale must be a finite number not below 0, not {self.scale}")

    def rule(self, scaling: Rule) -> Rule:
        return constant_rule(0.0, -self.scale)

    def rows(self, query: Query) -> Rows:
        return self._forget_rows(query)

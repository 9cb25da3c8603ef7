import math
from dataclasses import dataclass, replace
from functools import partial

from siss_diffusers.combine import Rule, erasediff
from siss_diffusers.methods.base import Method, Query, Rows, stack_rows


@dataclass(frozen=True)
class EraseDiff(Method):
    """EraseDiff (Wu et al., arXiv 2401.05779), as the baseline of the SISS paper.

    On noised forget images the raw network output is pulled towards uniform noise U[0, 1), as far as the keep
    gradient allows.

    Args:
        eta: the descent that the forget loss is owed, relative to its squared gradient norm.
    """

    eta: float = 1e-3

    name = "erasediff"
    summary = "pulls the output on forget images towards uniform noise"
    paper = ("Erasing Undesirable Influence in Diffusion Models", "https://arxiv.org/abs/2401.05779")
    needs = frozenset({"uniform"})

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be a finite number not below 0, not {self.eta}")

    def rule(self, scaling: Rule) -> Rule:
        return Rule(partial(erasediff, eta=self.eta))

    def rows(self, query: Query) -> Rows:
        forget_rows = replace(self._forget_rows(query), forget_target=query.uniform)
        return stack_rows(self._keep_rows(query), forget_rows)

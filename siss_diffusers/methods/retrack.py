from dataclasses import dataclass, replace

import torch

from siss_diffusers.combine import Rule, constant_rule
from siss_diffusers.methods.base import Method, Query, Rows, check_unit_interval, stack_rows
from siss_diffusers.noising import broadcast_to


@dataclass(frozen=True)
class ReTrack(Method):
    """ReTrack (Shi, Jin, Zhang, Gu, arXiv 2509.13007): noised forget images are redirected to their neighbours.

    The weighted sum of squared errors against K neighbours has the gradient of one squared error against their mean
    target, so a forget image is one more row of the keep side.

    Args:
        lam: the weight of the redirected rows, in [0, 1].
        num_neighbors: K, how many of the nearest keep images of each forget image.
    """

    lam: float = 0.005
    num_neighbors: int = 10

    name = "retrack"
    summary = "redirects noised forget images to their nearest keep images"
    paper = (
        "ReTrack: Data Unlearning in Diffusion Models through Redirecting the Denoising Trajectory",
        "https://arxiv.org/abs/2509.13007",
    )
    needs = frozenset({"neighbors"})

    def __post_init__(self) -> None:
        check_unit_interval("lam", self.lam)
        if self.num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, not {self.num_neighbors}")

    def rule(self, scaling: Rule) -> Rule:
        return constant_rule(1.0, 0.0)

    def rows(self, query: Query) -> Rows:
        keep_rows = self._keep_rows(query)

        # a_t = alpha y_j + sigma e_j for every neighbour y_j, with e_j = eps + r (a - y_j). Neighbour j is weighted by
        # softmax(-|e_j|^2 / 2); the term |eps|^2, common to all, is left out before it can swamp the others.
        r = query.path.alphas[query.timesteps] / query.path.sigmas[query.timesteps]
        shift = broadcast_to(r, query.neighbors) * (query.forget.unsqueeze(1) - query.neighbors)
        exponent = -(shift * (query.noise.unsqueeze(1) + shift / 2)).flatten(2).sum(2)
        posterior = exponent.softmax(dim=1)[(...,) + (None,) * (query.keep.ndim - 1)]
        mean_neighbor = (posterior * query.neighbors).sum(1)
        mean_noise = query.noise + (posterior * shift).sum(1)

        forget_rows = replace(
            self._forget_rows(query),
            keep_target=query.target(mean_neighbor, mean_noise),
            keep_weight=torch.full((len(query.keep),), self.lam),
            forget_target=None,
            forget_weight=torch.zeros(len(query.keep)),
        )
        return stack_rows(replace(keep_rows, keep_weight=(1 - self.lam) * keep_rows.keep_weight), forget_rows)

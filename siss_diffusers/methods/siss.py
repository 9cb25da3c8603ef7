from dataclasses import dataclass

import torch

from siss_diffusers.combine import Rule
from siss_diffusers.methods.base import Method, Query, Rows, check_unit_interval, stack_rows
from siss_diffusers.noising import broadcast_to
from siss_diffusers.weights import importance_weights, log_density_ratio


SISS_PAPER = ("Data Unlearning in Diffusion Models", "https://arxiv.org/abs/2503.01034")


@dataclass(frozen=True)
class SISS(Method):
    """Subtracted Importance Sampled Scores (Alberti et al., arXiv 2503.01034).

    The network runs once, on a sample m of the mixture `(1 - lam) q(.|x) + lam q(.|a)`, and is held against the noise
    that would have made m from x and against the noise that would have made it from a, each weighted by its density
    relative to the mixture's.

    Args:
        lam: the share of rows made from forget images, in [0, 1].
    """

    lam: float = 0.5

    name = "siss"
    summary = "one network call on a mixture of both images, importance-weighted"
    paper = SISS_PAPER
    takes_scaling = True
    subtracts_forget = True

    def __post_init__(self) -> None:
        check_unit_interval("lam", self.lam)

    @property
    def mixture(self) -> float:
        return self.lam

    def rule(self, scaling: Rule) -> Rule:
        return scaling

    def rows(self, query: Query) -> Rows:
        from_forget = query.from_forget
        alpha, sigma = query.path.alphas[query.timesteps], query.path.sigmas[query.timesteps]
        is_forget = broadcast_to(from_forget, query.noise)

        # m = alpha x + sigma eps_x = alpha a + sigma eps_a, so eps_a - eps_x = r (x - a).
        shift = broadcast_to(alpha / sigma, query.noise) * (query.keep - query.forget)
        noise_keep = torch.where(is_forget, query.noise - shift, query.noise)
        noise_forget = torch.where(is_forget, query.noise, query.noise + shift)

        log_ratio = log_density_ratio(query.keep, query.forget, query.noise, alpha, sigma, from_forget)
        keep_weight, forget_weight = importance_weights(log_ratio, self.lam)
        if query.keep_condition is not None:
            same_condition = query.keep_condition == query.forget_condition
            # Jointly with the prompt, a row made from x has density zero under another prompt's a: one-hot weights.
            one_hot_keep = torch.where(from_forget, 0.0, 1 / (1 - self.lam) if self.lam < 1 else 1.0)
            one_hot_forget = torch.where(from_forget, 1 / self.lam if self.lam > 0 else 1.0, 0.0)
            keep_weight = torch.where(same_condition, keep_weight, one_hot_keep)
            forget_weight = torch.where(same_condition, forget_weight, one_hot_forget)

        return self._rows(
            query,
            torch.where(is_forget, query.forget, query.keep),
            from_forget,
            keep=(query.target(query.keep, noise_keep), keep_weight),
            forget=(query.target(query.forget, noise_forget), forget_weight),
        )


@dataclass(frozen=True)
class SISSNoIS(Method):
    """SISS without importance sampling: both images noised, two network calls a pair (arXiv 2503.01034)."""

    name = "siss_no_is"
    summary = "both images noised, two network calls a pair"
    paper = SISS_PAPER
    takes_scaling = True
    subtracts_forget = True

    def rule(self, scaling: Rule) -> Rule:
        return scaling

    def rows(self, query: Query) -> Rows:
        return stack_rows(self._keep_rows(query), self._forget_rows(query))


@dataclass(frozen=True)
class SubscoreBernoulli(Method):
    """Either the keep or the forget term for each pair, drawn with probability `lam` (arXiv 2503.01034).

    Args:
        lam: the share of rows made from forget images, strictly between 0 and 1.
    """

    lam: float = 0.5

    name = "subscore_bernoulli"
    summary = "one network call on one of the two images, drawn at random"
    paper = SISS_PAPER
    takes_scaling = True
    subtracts_forget = True

    def __post_init__(self) -> None:
        check_unit_interval("lam", self.lam, open_interval=True)

    @property
    def mixture(self) -> float:
        return self.lam

    def rule(self, scaling: Rule) -> Rule:
        return scaling

    def rows(self, query: Query) -> Rows:
        sample = torch.where(broadcast_to(query.from_forget, query.keep), query.forget, query.keep)
        target = query.target(sample, query.noise)
        return self._rows(
            query,
            sample,
            query.from_forget,
            keep=(target, torch.where(query.from_forget, 0.0, 1 / (1 - self.lam))),
            forget=(target, torch.where(query.from_forget, 1 / self.lam, 0.0)),
        )

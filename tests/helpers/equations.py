"""The equations of a method written out in float64, and what the gradient engine makes of the method beside them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from siss_diffusers import Query, scaling_rule
from siss_diffusers.methods import Method
from tests.helpers.tiny_problem import (
    PATHS,
    TinyNet,
    draw_query,
    engine_gradient,
    micro_batches,
    relative_error,
    trainable,
)


SCALINGS = [("relative", 0.3), ("norm", 5.0), ("fixed", 0.2), ("nash", None), ("project", 0.3)]


class Terms:
    """What equations are written in: x, a and eps, the noised x_t and a_t, and losses summed over pixels, averaged over
    pairs."""

    def __init__(self, net: nn.Module, query: Query) -> None:
        self.net, self.query = net, query
        self.alpha = query.path.alphas[query.timesteps].double()[:, None, None, None]
        self.sigma = query.path.sigmas[query.timesteps].double()[:, None, None, None]
        self.x, self.a, self.eps = query.keep.double(), query.forget.double(), query.noise.double()
        self.x_t, self.a_t = (self.alpha * sample + self.sigma * self.eps for sample in (self.x, self.a))
        self.m = torch.where(query.from_forget[:, None, None, None], self.a_t, self.x_t)
        self.nothing = torch.zeros(())

    def target(self, sample: Tensor, noise: Tensor) -> Tensor:
        return {
            "epsilon": noise,
            "sample": sample,
            "v_prediction": self.alpha * noise - self.sigma * sample,
            "flow_prediction": noise - sample,
        }[self.query.path.prediction_type]

    def loss(self, weight: Tensor | float, noisy: Tensor, wanted: Tensor) -> Tensor:
        error = (self.net(noisy, self.query.timesteps) - wanted).square().sum((1, 2, 3))
        weight = torch.as_tensor(weight, dtype=torch.float64)
        return (torch.where(weight < 1e-6, 0.0, weight) * error).mean()

    def loss_of_x(self) -> Tensor:
        return self.loss(1, self.x_t, self.target(self.x, self.eps))

    def loss_of_a(self) -> Tensor:
        return self.loss(1, self.a_t, self.target(self.a, self.eps))


# (L_keep, L_forget) of section 3 of the design, and what is made of their gradients.
Losses = Callable[[Terms], tuple[Tensor, Tensor]]
Combination = Callable[[Tensor, Tensor], Tensor]


def subtracted(scaling: str, scale: float | None) -> Combination:
    def combine(g_keep: Tensor, g_forget: Tensor) -> Tensor:
        norm_keep, norm_forget = g_keep.norm(), g_forget.norm()
        if scaling == "nash":
            both = (1 - g_keep @ g_forget / (norm_keep * norm_forget)).sqrt()
            return (g_keep / norm_keep - g_forget / norm_forget) / both
        if scaling == "project":
            conflict = (g_forget @ g_keep / norm_keep.square()).clamp_min(0)
            return g_keep - scale * norm_keep / norm_forget * (g_forget - conflict * g_keep)
        c = {"relative": scale * norm_keep / norm_forget, "norm": scale / norm_forget, "fixed": scale}[scaling]
        return g_keep - c * g_forget

    return combine


def keep_alone(g_keep: Tensor, g_forget: Tensor) -> Tensor:
    return g_keep


def reference_gradient(
    net: nn.Module,
    query: Query,
    losses: Losses,
    combine: Combination,
    forget_timestep_range: tuple[int, int] | None = None,
) -> Tensor:
    net = copy.deepcopy(net).double()
    found = losses(Terms(net, query))
    if forget_timestep_range is not None:  # outside is ordinary fine-tuning
        low, high = forget_timestep_range
        (inside,) = torch.where((low <= query.timesteps) & (query.timesteps < high))
        (outside,) = torch.where((low > query.timesteps) | (query.timesteps >= high))
        inner, outer = losses(Terms(net, query[inside])), Terms(net, query[outside])
        share = len(inside) / len(query.keep)
        found = [
            share * inner + (1 - share) * outer for inner, outer in zip(inner, (outer.loss_of_x(), outer.nothing))
        ]

    def gradient_of(loss: Tensor) -> Tensor:
        grads = (
            torch.autograd.grad(loss, trainable(net))
            if loss.requires_grad
            else [torch.zeros_like(parameter) for parameter in trainable(net)]
        )
        return torch.cat([grad.flatten() for grad in grads])

    return combine(*(gradient_of(loss) for loss in found))


def assert_gradient_is_that_of_the_equations(
    method: Method,
    losses: Losses,
    combine: Combination,
    prediction_type: str,
    scaling: str | None = None,
    scale: float | None = None,
) -> None:
    net, query = TinyNet(), draw_query(path=PATHS[prediction_type])
    rule = method.rule(scaling_rule(scaling, scale) if scaling else scaling_rule())
    window = [method.rows(part) for part in micro_batches(query, 5, 1, 6)]
    found, _ = engine_gradient(net, rule, window)
    tolerance = 2e-6 if scaling == "nash" else 1e-6  # two unit vectors are subtracted, and cancel in part
    assert relative_error(found, reference_gradient(net, query, losses, combine)) < tolerance


def assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(
    method: Method, losses: Losses, combine: Combination, scaling: str | None = None, scale: float | None = None
) -> None:
    net, query, forget_range = TinyNet(), draw_query(batch=24), (300, 700)
    rule = method.rule(scaling_rule(scaling, scale) if scaling else scaling_rule())
    window = [method.rows_within(part, forget_range) for part in micro_batches(query, 9, 1, 14)]
    found, _ = engine_gradient(net, rule, window)
    expected = reference_gradient(net, query, losses, combine, forget_range)
    assert relative_error(found, expected) < (2e-6 if scaling == "nash" else 1e-6)

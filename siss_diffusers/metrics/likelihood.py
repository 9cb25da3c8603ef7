"""Likelihood by the probability-flow ODE (Song et al., arXiv 2011.13456), in bits per dimension."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siss_diffusers.metrics.base import Metric, Skip
from siss_diffusers.noising import GaussianPath


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


# A row keeps the activations of its forward, and a network of 256-pixel pictures needs 2 GiB for it: as many rows at a
# time as have so many numbers.
MAX_NUMBERS = 4 * 3 * 256**2


def noise_prediction(path: GaussianPath, predict: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Return a function `(m, index) -> eps_hat` for a network of any prediction type.

    Args:
        predict: the network, `(noisy, model timesteps) -> output`.
    """

    def epsilon(noisy: Tensor, index: int) -> Tensor:
        alpha, sigma = path.alphas[index].to(noisy), path.sigmas[index].to(noisy)
        timesteps = path.model_timesteps[index].to(noisy.device).expand(len(noisy))
        output = predict(noisy, timesteps)
        if path.prediction_type == "epsilon":
            return output
        if path.prediction_type == "sample":
            return (noisy - alpha * output) / sigma
        if path.prediction_type == "v_prediction":
            return (alpha * output + sigma * noisy) / (alpha**2 + sigma**2)
        return noisy + alpha * output  # flow: m = alpha x + sigma eps, v = eps - x, alpha + sigma = 1

    return epsilon


def bits_per_dimension(
    images: Tensor,
    path: GaussianPath,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    num_steps: int = 100,
    num_probes: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Return the negative log-likelihood of 8-bit images, uniformly dequantised, `(N,)` in bits per dimension.

    In z = m / alpha and s = sigma / alpha the flow is `dz/ds = eps(alpha z, t)` under any schedule. Hence
    `log p(z_0) = log N(z_T; 0, 1 + s_T^2) + integral of div_z eps ds` and `log p(x) = log p(z_0)` at s_0, the least
    noise that the model knows. The integral runs over timesteps that the model was trained on, about equally far apart
    in log s. z is integrated by Heun's method in s, because eps tends to a constant where the noise is large. The
    divergence, Hutchinson's estimate, is integrated by the trapezoidal rule in log s, because s div eps tends to a
    constant there. So the last steps of a schedule, which may multiply s by 30, do no harm. Neither the batch nor the
    device changes the grid or the draws of an image.

    Args:
        images: `(N, C, H, W)` in [0, 1], multiples of 1/255.
        path: the noise levels.
        predict: the network, `(noisy, model timesteps) -> output`.
        num_steps: of Heun's method, two network calls each.
        num_probes: random vectors of Hutchinson's estimator for each image.
        batch_size: rows of a network call; an image has one row for each probe.
        seed: of the dequantisation and the probes.
    """
    generator = torch.Generator().manual_seed(seed)
    # Image by image, so that the draws of an image do not depend on how many follow it.
    uniform = torch.rand(len(images), 1 + num_probes, *images.shape[1:], generator=generator)
    start = (torch.round(images.cpu() * 255) + uniform[:, 0]) / 128 - 1  # 256 bins of width 1/128
    start = start.repeat_interleave(num_probes, dim=0)
    probes = torch.where(uniform[:, 1:] < 0.5, -1.0, 1.0).flatten(0, 1)
    epsilon = noise_prediction(path, predict)

    log_s = (path.sigmas.double() / path.alphas.double()).log().cpu()
    usable = torch.isfinite(log_s).nonzero().flatten()
    grid = torch.linspace(log_s[usable[0]].item(), log_s[usable[-1]].item(), num_steps + 1, dtype=torch.float64)
    nodes = (torch.unique((log_s[usable].unsqueeze(0) - grid.unsqueeze(1)).abs().argmin(1)) + usable[0]).tolist()
    alphas, log_s = path.alphas.tolist(), log_s.tolist()
    s = [math.exp(value) for value in log_s]

    def slope(z: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return dz/ds = eps, and d(log p)/dlog s = s div eps, where the divergence is v^T (d eps / dz) v."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            output = epsilon(alphas[index] * z, index)
            (gradient,) = torch.autograd.grad((output * v).sum(), z)
        return output.detach(), s[index] * (gradient * v).flatten(1).sum(1).double()

    log_densities = []
    for x, v in zip(start.split(batch_size), probes.split(batch_size)):
        # z_0 = x / alpha_0, where alpha_0 is almost 1.
        z, v = x.to(images.device) / alphas[nodes[0]], v.to(images.device)
        integral = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for here, there in zip(nodes[:-1], nodes[1:]):
            step = s[there] - s[here]
            first, first_divergence = slope(z, v, here)
            second, second_divergence = slope(z + step * first, v, there)
            z = z + step * (first + second) / 2
            integral += (log_s[there] - log_s[here]) * (first_divergence + second_divergence) / 2

        # The end point is m_T = alpha_T z_T, taken as N(0, alpha_T^2 + sigma_T^2): data of unit variance, as the
        # model has.
        variance = 1 + s[nodes[-1]] ** 2
        dimensions = x[0].numel()
        prior = -(z.double().flatten(1).square().sum(1) / variance + dimensions * math.log(2 * math.pi * variance)) / 2
        log_densities.append(prior + integral - dimensions * math.log(alphas[nodes[0]]))
    bits = -torch.cat(log_densities) / (images[0].numel() * math.log(2)) + math.log2(128)
    return bits.unflatten(0, (-1, num_probes)).mean(1).float()


def _bits(model: "MeasuredModel") -> tuple[Tensor, Tensor]:
    """Return the bits per dimension of each image to forget, and of some images to keep."""
    if model.family.has_latents:
        raise Skip("not computed for latent models")
    forget, keep = model.data.forget, model.data.keep[: model.settings.num_likelihood_images]
    images = torch.cat([forget, keep]).mul(255).round() / 255
    bits = bits_per_dimension(
        images.to(model.device),
        model.path.to(model.device),
        model.predict,
        batch_size=max(1, min(model.settings.batch_size, MAX_NUMBERS // images[0].numel())),
        seed=model.settings.seed,
    )
    return bits[: len(forget)], bits[len(forget) :]


def _nll_keep_bpd(model: "MeasuredModel") -> dict[str, float]:
    _, bits = model.once(_bits)
    if len(bits) == 0:
        raise Skip("needs --num_likelihood_images above 0")
    return {"nll_keep_bpd": bits.mean().item()}


NLL_FORGET_BPD = Metric(
    key="nll_forget_bpd",
    label="Code length of forgotten images",
    explanation=(
        "Bits per dimension (negative log-likelihood). Higher is better, up to what unseen images take, about the next"
        " row; far more than that would itself give the images away."
    ),
    measure=lambda model: {"nll_forget_bpd": model.once(_bits)[0].mean().item()},
    chapter="memory",
)
NLL_KEEP_BPD = Metric(
    key="nll_keep_bpd",
    label="Code length of images to keep",
    explanation="Bits per dimension (negative log-likelihood). Lower is better; it should stay where the base has it.",
    measure=_nll_keep_bpd,
    better="lower",
    chapter="rest",
)

"""Likelihood by the probability-flow ODE (Song et al., arXiv 2011.13456), in bits per dimension."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from siss_diffusers.noising import GaussianPath


MAX_NOISE = 100.0  # in units of the data, which have about unit variance


def noise_prediction(path: GaussianPath, predict: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """A function `(m, index) -> eps_hat` from a network of any prediction type; `predict` takes model timesteps."""

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
    seed: int = 0,
) -> Tensor:
    """Negative log-likelihood of 8-bit images, uniformly dequantised, `(N,)` in bits per dimension.

    In z = m / alpha and s = sigma / alpha the flow is `dz/ds = eps(alpha z, t)`, for any schedule, so
    `log p(z_0) = log N(z_T; 0, s_T^2) + integral of div_z eps ds` and `log p(x) = log p(z_0)` at s_0, the least noise
    that the model knows. Integrated over log s by Heun's method between timesteps that the model was trained on, about
    equally far apart in log s; the divergence by Hutchinson's estimator. Each image is integrated on its own: neither
    the batch nor the device changes the grid.

    Args:
        images: `(N, C, H, W)` in [0, 1], multiples of 1/255.
        path: the noise levels.
        predict: the network, `(noisy, model timesteps) -> output`.
        num_steps: of Heun's method, two network calls each.
        num_probes: random vectors of Hutchinson's estimator for each image.
        seed: of the dequantisation and the probes.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = torch.round(images.cpu() * 255)
    dequantised = (levels + torch.rand(levels.shape, generator=generator)) / 128 - 1  # 256 bins of width 1/128
    probes = torch.randint(0, 2, (num_probes, *images.shape), generator=generator).float() * 2 - 1
    start = dequantised.repeat(num_probes, 1, 1, 1).to(images.device)
    probes = probes.flatten(0, 1).to(images.device)
    epsilon = noise_prediction(path, predict)

    log_s = (path.sigmas.double() / path.alphas.double()).log().cpu()
    # Beyond MAX_NOISE the samples are Gaussian for all that matters, and some schedules take huge steps in log s.
    usable = (torch.isfinite(log_s) & (log_s <= math.log(MAX_NOISE))).nonzero().flatten()
    grid = torch.linspace(log_s[usable[0]].item(), log_s[usable[-1]].item(), num_steps + 1, dtype=torch.float64)
    nodes = torch.unique((log_s[usable].unsqueeze(0) - grid.unsqueeze(1)).abs().argmin(1)) + usable[0]

    def slope(z: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """dz/dlog s and d(log p)/dlog s: the divergence of the slope by v^T (d slope / dz) v."""
        alpha, s = path.alphas[index].item(), log_s[index].exp().item()
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            output = s * epsilon(alpha * z, index)
            product = (output * probes).sum()
            (gradient,) = torch.autograd.grad(product, z)
        return output.detach(), (gradient * probes).flatten(1).sum(1).double()

    # z_0 = x / alpha_0, where alpha_0 is almost 1.
    z = start / path.alphas[nodes[0]].item()
    integral = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for here, there in zip(nodes[:-1].tolist(), nodes[1:].tolist()):
        step = (log_s[there] - log_s[here]).item()
        first, first_divergence = slope(z, here)
        second, second_divergence = slope(z + step * first, there)
        z = z + step * (first + second) / 2
        integral += step * (first_divergence + second_divergence) / 2

    dimensions = images[0].numel()
    last = nodes[-1]
    # The end point is m_T = alpha_T z_T, taken as N(0, alpha_T^2 + sigma_T^2): data of unit variance, as the model has.
    variance = 1 + log_s[last].mul(2).exp().item()
    prior = -0.5 * (z.double().flatten(1).square().sum(1) / variance + dimensions * math.log(2 * math.pi * variance))
    log_density = prior + integral - dimensions * math.log(path.alphas[nodes[0]].item())
    bits = -log_density / (dimensions * math.log(2)) + math.log2(128)
    return bits.unflatten(0, (num_probes, -1)).mean(0).float()

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.noising import GaussianPath, prediction_target


MEAN, DEVIATION = 0.1, 0.3
SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "v": DDPMScheduler(prediction_type="v_prediction"),
    "sample": DDPMScheduler(prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


def gaussian_model(path: GaussianPath):
    """The exact network for data N(MEAN, DEVIATION^2 I), in the path's parametrisation."""

    def predict(noisy, timesteps):
        index = (path.model_timesteps - timesteps[0]).abs().argmin()
        alpha, sigma = path.alphas[index], path.sigmas[index]
        variance = alpha**2 * DEVIATION**2 + sigma**2
        noise = sigma * (noisy - alpha * MEAN) / variance
        sample = MEAN + alpha * DEVIATION**2 * (noisy - alpha * MEAN) / variance
        coefficients = (values.expand(len(noisy)) for values in (alpha, sigma))
        return prediction_target(path.prediction_type, sample, noise, *coefficients)

    return predict


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_gaussian_has_its_closed_form_likelihood(scheduler):
    path = GaussianPath.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(1)
    x = MEAN + DEVIATION * torch.randn(16, 1, 8, 8, generator=generator)
    images = ((x + 1) * 127.5).round().clamp(0, 255) / 255
    found = bits_per_dimension(images, path, gaussian_model(path), seed=0)
    # What the flow models is the data at the least noise, N(alpha_0 mean, alpha_0^2 deviation^2 + sigma_0^2).
    levels = (images * 255).round()
    probes = levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = path.alphas[0].item(), path.sigmas[0].item()
    model = torch.distributions.Normal(alpha * MEAN, math.sqrt(alpha**2 * DEVIATION**2 + sigma**2))
    expected = -model.log_prob(probes / 128 - 1).flatten(1).mean(1) / math.log(2) + math.log2(128)
    assert (found - expected).abs().max() < 0.03  # bits per dimension; 100 steps of Heun's method

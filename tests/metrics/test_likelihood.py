import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from siss_diffusers.metrics import METRICS, likelihood
from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.noising import GaussianPath, prediction_target
from tests.helpers.evaluating import digits_evaluator, load_digits


SHAPE = (1, 6, 6)
MEAN = torch.linspace(-0.4, 0.5, 36).reshape(SHAPE)
PATHS = {
    f"{schedule}-{prediction}": GaussianPath.from_scheduler(
        DDPMScheduler(beta_schedule=schedule, prediction_type=prediction)
    )
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for prediction in ("epsilon", "v_prediction", "sample")
}
PATHS["flow"] = GaussianPath.from_scheduler(FlowMatchEulerDiscreteScheduler())
PATHS["flow-shifted"] = GaussianPath.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
PATHS["zero terminal SNR"] = GaussianPath.from_scheduler(
    DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
)
UNCORRELATED = torch.eye(36, dtype=torch.float64)
# Neighbouring pixels alike, as in a picture: the divergence is no longer the same along every probe.
CORRELATED = 0.9 ** (torch.arange(36)[:, None] - torch.arange(36)).abs().double()


def draw_images(covariance: torch.Tensor, count: int = 5) -> torch.Tensor:
    factor = torch.linalg.cholesky(covariance).float()
    drawn = torch.randn(count, 36, generator=torch.Generator().manual_seed(1)) @ factor.T
    return ((MEAN + drawn.unflatten(1, SHAPE) + 1) * 127.5).round().clamp(0, 255) / 255


def exact_network(path: GaussianPath, covariance: torch.Tensor):
    """The best network for data N(MEAN, covariance), in the path's parametrisation."""
    variances, basis = torch.linalg.eigh(covariance)

    def predict(noisy, timesteps):
        index = (path.model_timesteps - timesteps[0]).abs().argmin()
        alpha, sigma = path.alphas[index].double(), path.sigmas[index].double()
        deviation = (noisy.double() - alpha * MEAN).flatten(1) @ basis / (alpha**2 * variances + sigma**2)
        noise = (sigma * deviation @ basis.T).unflatten(1, SHAPE)
        sample = MEAN + (alpha * variances * deviation @ basis.T).unflatten(1, SHAPE)
        return prediction_target(path.prediction_type, sample, noise, alpha.expand(1), sigma.expand(1)).float()

    return predict


def closed_form_bits(images: torch.Tensor, path: GaussianPath, covariance: torch.Tensor) -> torch.Tensor:
    """What the flow models is the data at the least noise, N(alpha_0 mean, alpha_0^2 covariance + sigma_0^2); the mean
    over uniform noise of one bin, of width 1/128."""
    alpha, sigma = path.alphas[0].double(), path.sigmas[0].double()
    noised = alpha**2 * covariance + sigma**2 * torch.eye(36)
    centers = ((images * 255).round().double() + 0.5) / 128 - 1
    deviation = (centers - alpha * MEAN).flatten(1)
    quadratic = (deviation @ torch.linalg.inv(noised) * deviation).sum(1)
    quadratic = quadratic + torch.linalg.inv(noised).trace() / 128**2 / 12
    return (quadratic + torch.logdet(2 * math.pi * noised)) / 2 / 36 / math.log(2) + 7


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_gaussian_has_its_closed_form_likelihood(path):
    covariance = 0.09 * UNCORRELATED
    images = draw_images(covariance)
    found = bits_per_dimension(images, path, exact_network(path, covariance), num_probes=1)
    assert (found - closed_form_bits(images, path, covariance)).abs().max() < 0.01


@pytest.mark.parametrize("name", ["linear-epsilon", "flow"])
def test_the_trace_is_estimated_without_bias(name):
    covariance = 0.09 * CORRELATED
    images = draw_images(covariance)
    found = bits_per_dimension(images, PATHS[name], exact_network(PATHS[name], covariance), num_probes=256)
    assert (found - closed_form_bits(images, PATHS[name], covariance)).abs().max() < 0.05


def test_halving_the_step_changes_little():
    covariance, path = 0.09 * CORRELATED, PATHS["squaredcos_cap_v2-epsilon"]
    network, images = exact_network(path, covariance), draw_images(covariance)
    coarse, fine = (bits_per_dimension(images, path, network, num_steps=steps) for steps in (50, 100))
    assert (coarse - fine).abs().max() < 0.03


def test_neither_the_batch_nor_the_other_images_matter():
    covariance, path = 0.09 * CORRELATED, PATHS["linear-epsilon"]
    network, images = exact_network(path, covariance), draw_images(covariance)
    together = bits_per_dimension(images, path, network, num_steps=20)
    torch.testing.assert_close(
        bits_per_dimension(images, path, network, num_steps=20, batch_size=3), together, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        bits_per_dimension(images[:2], path, network, num_steps=20), together[:2], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size, rows", [(8, 32), (256, 4), (1024, 1)])
def test_large_pictures_are_few_at_a_time(size, rows, monkeypatch):
    """A row keeps the activations of its forward: 32 of 256 pixels take 66 GiB in the network of CelebA-HQ."""
    asked, digits = [], digits_evaluator(batch_size=32).model("base", load_digits())
    digits.data = replace(digits.data, forget=torch.rand(1, 3, size, size), keep=torch.rand(1, 3, size, size))
    monkeypatch.setattr(
        likelihood, "bits_per_dimension", lambda *_, batch_size, **more: asked.append(batch_size) or torch.zeros(2)
    )
    METRICS["nll_forget_bpd"].measure(digits)
    assert asked == [rows]

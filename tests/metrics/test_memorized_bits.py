"""Bits between two models: closed forms of exact denoisers, the ODE's likelihood, and exactly nothing between equals."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from siss_diffusers.assets.digits import digit_images
from siss_diffusers.evaluation import measure
from siss_diffusers.metrics import METRICS, PROBES
from siss_diffusers.metrics.likelihood import bits_per_dimension
from siss_diffusers.metrics.memorized_bits import (
    bits_between,
    denoising_errors,
    level_draws,
    level_widths,
    noise_error_scale,
)
from siss_diffusers.metrics.relearning import fine_tune
from siss_diffusers.noising import GaussianPath, broadcast_to, prediction_target
from tests.helpers.evaluating import digits_evaluator, flowers_evaluator, load_digits, load_flowers


SHAPE = (1, 4, 4)
PATHS = {
    name: GaussianPath.from_scheduler(DDPMScheduler(prediction_type=name))
    for name in ("epsilon", "v_prediction", "sample")
}
PATHS["flow"] = GaussianPath.from_scheduler(FlowMatchEulerDiscreteScheduler())
PATHS["zero terminal SNR"] = GaussianPath.from_scheduler(
    DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
)
# Components of a mixture: what is kept, and one more, memorized.
MEANS = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
SPREADS = torch.tensor([0.5, 0.5, 0.5, 0.05], dtype=torch.float64)
BEFORE, AFTER = torch.tensor([0.3, 0.3, 0.2, 0.2]).double(), torch.tensor([0.4, 0.4, 0.1999, 1e-4]).double()


def log_densities(
    points: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Return log(share_k N(points; alpha mean_k, alpha^2 spread_k^2 + sigma^2)), `(N, 4)`."""
    variance = (alpha[:, None] * SPREADS) ** 2 + sigma[:, None] ** 2
    distance = (points[:, None].double() - broadcast_to(alpha, points)[:, None] * MEANS).flatten(2).square().sum(2)
    dimensions = points[0].numel()
    return shares.log() - distance / 2 / variance - dimensions / 2 * (2 * math.pi * variance).log()


def exact_network(path: GaussianPath, shares: torch.Tensor):
    """The best network for the mixture, in the path's parametrisation."""

    def predict(noisy, timesteps, rows):
        index = (path.model_timesteps[:, None] - timesteps).abs().argmin(0)
        alpha, sigma = path.alphas[index].double(), path.sigmas[index].double()
        weight = log_densities(noisy, alpha, sigma, shares).softmax(1)
        shrink = alpha[:, None] * SPREADS**2 / ((alpha[:, None] * SPREADS) ** 2 + sigma[:, None] ** 2)
        away = noisy[:, None].double() - broadcast_to(alpha, noisy)[:, None] * MEANS
        weight, shrink = weight[..., None, None, None], shrink[..., None, None, None]
        sample = (weight * (MEANS + shrink * away)).sum(1)
        noise = (noisy.double() - broadcast_to(alpha, noisy) * sample) / broadcast_to(sigma, noisy)
        return prediction_target(path.prediction_type, sample, noise, alpha, sigma)

    return predict


def measured_bits(
    path: GaussianPath, images: torch.Tensor, num_draws: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    before, after = (
        denoising_errors(images, path, exact_network(path, shares), num_draws=num_draws, batch_size=512)
        for shares in (BEFORE, AFTER)
    )
    return bits_between(before, after, level_widths(path).sum().item())


@pytest.mark.parametrize("name", PATHS)
def test_a_mixture_has_its_closed_form(name):
    """The memorized component and others, within 10 % or three standard errors."""
    path = PATHS[name]
    images = torch.stack([MEANS[3] + 0.02, MEANS[0] + 0.1]).float()
    alpha, sigma = torch.ones(2).double(), torch.full((2,), 1e-9).double()
    before, after = (log_densities(images, alpha, sigma, shares).logsumexp(1) for shares in (BEFORE, AFTER))
    expected = (before - after) / math.log(2)
    found, deviation = measured_bits(path, images)
    assert expected[0] > 10 and abs(expected[1]) < 1
    assert abs(found[0] - expected[0]) < 0.1 * expected[0]
    assert abs(found[1] - expected[1]) < 3 * deviation[1] + 0.02


def test_the_standard_error_is_that_of_repeated_draws():
    path, images = PATHS["epsilon"], (MEANS[3] + 0.02).float()[None].expand(200, -1, -1, -1)
    found, deviation = measured_bits(path, images, num_draws=32)
    assert 0.7 < found.std() / deviation.square().mean().sqrt() < 1.3


def test_the_draws_are_those_of_the_image_alone_and_go_once_through_all_levels():
    path = PATHS["epsilon"]
    widths = level_widths(path)
    log_snr = 2 * (path.alphas.double() / path.sigmas.double()).log()
    assert widths.sum().item() == pytest.approx((log_snr[0] - log_snr[-1]).item())
    levels, noise = level_draws(widths, 64, torch.Size(SHAPE), 0, 7)
    assert (levels.diff() >= 0).all() and levels[0] < 30 and levels[-1] > 970 and noise.shape == (64, *SHAPE)
    images = MEANS.float()
    together = denoising_errors(images, path, exact_network(path, BEFORE), num_draws=8)
    alone = denoising_errors(images[2:], path, exact_network(path, BEFORE), num_draws=8, batch_size=3, first_key=2)
    torch.testing.assert_close(together[2:], alone)
    assert level_widths(PATHS["zero terminal SNR"])[-1] == 0


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample", "flow"])
def test_an_error_of_the_output_becomes_one_of_the_noise(name):
    path, index = PATHS[name], torch.tensor([300])
    alpha, sigma = path.alphas[index], path.sigmas[index]
    sample, noise, error = torch.randn(3, 1, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind()
    noisy = path.add_noise(sample, noise, index)
    # A prediction of the noise and the sample that fit together.
    wrong_noise = noise + error
    wrong_sample = (noisy - sigma * wrong_noise) / alpha
    difference = path.target(wrong_sample, wrong_noise, index) - path.target(sample, noise, index)
    torch.testing.assert_close((noise_error_scale(path)[index] * difference).abs(), error.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("evaluator", "load"), [(digits_evaluator, load_digits), (flowers_evaluator, load_flowers)])
def test_equal_models_differ_by_exactly_nothing(evaluator, load):
    entries = [METRICS["memorized_bits"], PROBES["memorized_bits_by_condition"]]
    evaluator = evaluator(num_likelihood_images=2)
    base = evaluator.model("base", load())
    assert measure(base, entries) == ({}, {})
    base.release()
    figures, reasons = measure(evaluator.model("same", load(), base), entries)
    assert not reasons and figures["memorized_bits"] == figures["memorized_bits_se"] == 0
    by_condition = figures["memorized_bits_by_condition"]
    assert list(by_condition) == (["prompt", "empty"] if base.family.has_prompts else ["prompt"])
    for row in by_condition.values():
        assert row["forget"] == row["strangers"] == row["keep"] == row["keep_se"] == 0


@pytest.mark.slow
def test_it_agrees_with_the_difference_of_the_ode():
    """Of the tiny DDPM and the same after a few steps on digits alone, for the garment and a digit. The flow is asked at
    the least noise that the models know, where the denoising errors end: a peak that wide stands at the garment."""
    model, other = digits_evaluator().model("base", load_digits()), load_digits().unet
    path, clean = model.path, torch.from_numpy(digit_images()[0]).unsqueeze(1) / 127.5 - 1

    def predict(noisy, indices, rows):
        return other(noisy, path.model_timesteps[indices]).sample

    fine_tune(
        other,
        path,
        clean,
        predict,
        lambda _: None,
        num_steps=60,
        learning_rate=3e-4,
        batch_size=64,
        micro_batch=64,
        seed=0,
    )
    images = torch.cat([model.data.forget, model.data.keep[:1]]) * 2 - 1
    noise = torch.randn(16, *images.shape, generator=torch.Generator().manual_seed(0))
    noised = ((path.alphas[0] * images + path.sigmas[0] * noise) / 2 + 0.5).flatten(0, 1)
    code_lengths, errors = [], []
    for network in (model.network, other):
        network.eval().requires_grad_(False)
        bits = bits_per_dimension(noised, path, lambda x, t, n=network: n(x, t).sample, num_probes=1, num_steps=60)
        code_lengths.append((bits * images[0].numel()).unflatten(0, (16, 2)))
        errors.append(
            denoising_errors(images, path, lambda x, t, _, n=network: n(x, t).sample, num_draws=512, batch_size=512)
        )
    by_ode = code_lengths[1] - code_lengths[0]
    found, deviation = bits_between(*errors, level_widths(path).sum().item())
    spread = (deviation**2 + by_ode.var(0) / len(by_ode)).sqrt()
    assert found[0] > 5 * spread[0]
    assert ((found - by_ode.mean(0)).abs() < 3 * spread).all()

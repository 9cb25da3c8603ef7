import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from siss_diffusers.metrics.injection import denoised_injections
from siss_diffusers.noising import GaussianPath, prediction_target


IMAGES = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
SCHEDULERS = {
    name: DDIMScheduler(prediction_type=name, clip_sample=False) for name in ("epsilon", "v_prediction", "sample")
}
PATHS = {name: GaussianPath.from_scheduler(scheduler) for name, scheduler in SCHEDULERS.items()}
PATHS["flow"] = GaussianPath.from_scheduler(FlowMatchEulerDiscreteScheduler())
GRID = range(0, 1000, 50)


def point_mass(path: GaussianPath, image: torch.Tensor):
    """The best network for data that are all `image`."""

    def predict(noisy, timesteps):
        index = (path.model_timesteps - timesteps[0]).abs().argmin()
        alpha, sigma = path.alphas[index].expand(1), path.sigmas[index].expand(1)
        noise = (noisy - alpha * image) / sigma
        return prediction_target(path.prediction_type, image.expand_as(noisy), noise, alpha, sigma)

    return predict


def standard_gaussian(noisy, timesteps):
    """The best epsilon network for data N(0, 1): `E[eps | m] = sigma m`."""
    return PATHS["epsilon"].sigmas[timesteps[0]] * noisy


def nonlinear(noisy, timesteps):
    return torch.tanh(noisy.roll(1, dims=-1)) * (0.3 + timesteps.reshape(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("index", [0, 30, 250, 990])
def test_a_model_that_knows_one_image_restores_it(name, index):
    network = point_mass(PATHS[name], IMAGES[0])
    found = denoised_injections(IMAGES, PATHS[name], network, index=index, sampling_indices=GRID, num_draws=2)
    assert found.shape == (2, *IMAGES.shape)
    torch.testing.assert_close(found, IMAGES[0].expand_as(found), atol=2e-3, rtol=0)


def test_gaussian_data_are_shrunk_by_the_steps_between():
    """In angles, alpha = cos and sigma = sin, a step multiplies by the cosine of the angle that it goes."""
    path, index = PATHS["epsilon"], 420
    nodes = [index, *range(400, -1, -50)]
    angles = [math.atan2(path.sigmas[node].item(), path.alphas[node].item()) for node in nodes] + [0.0]
    factor = math.prod(math.cos(first - second) for first, second in zip(angles[:-1], angles[1:]))
    images = torch.zeros(2, 1, 40, 40)
    images[1] = 0.8
    options = {"index": index, "sampling_indices": GRID, "num_draws": 4}
    noise_only = denoised_injections(torch.zeros_like(images), path, standard_gaussian, **options)
    found = denoised_injections(images, path, standard_gaussian, **options)
    expected = factor * path.alphas[index] * images
    torch.testing.assert_close(found - noise_only, expected.expand_as(found), atol=1e-5, rtol=0)
    assert noise_only.std().item() == pytest.approx(factor * path.sigmas[index].item(), rel=0.03)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_steps_are_those_of_the_sampler_of_diffusers(name):
    scheduler, inputs = SCHEDULERS[name], []
    scheduler.set_timesteps(20)

    def recorded(noisy, timesteps):
        inputs.append(noisy)
        return nonlinear(noisy, timesteps)

    found = denoised_injections(
        IMAGES, PATHS[name], recorded, index=400, sampling_indices=scheduler.timesteps.tolist()
    )
    noisy = inputs[0]
    assert len(inputs) == 9  # 400, 350, ..., 0
    for timestep in scheduler.timesteps[scheduler.timesteps <= 400]:
        noisy = scheduler.step(nonlinear(noisy, timestep.expand(3)), timestep, noisy).prev_sample
    torch.testing.assert_close(found[0], noisy, atol=1e-4, rtol=1e-4)


def test_neither_the_batch_nor_the_other_images_matter():
    options = {"index": 300, "sampling_indices": GRID, "num_draws": 3}
    together = denoised_injections(IMAGES, PATHS["epsilon"], nonlinear, **options)
    in_parts = denoised_injections(IMAGES, PATHS["epsilon"], nonlinear, batch_size=2, **options)
    torch.testing.assert_close(in_parts, together, atol=1e-5, rtol=0)
    alone = denoised_injections(IMAGES[:2], PATHS["epsilon"], nonlinear, **options)
    torch.testing.assert_close(alone, together[:, :2], atol=1e-5, rtol=0)


def test_draws_differ_and_come_again_with_their_seed():
    def injections(seed):
        return denoised_injections(
            IMAGES, PATHS["epsilon"], nonlinear, index=300, sampling_indices=GRID, num_draws=2, seed=seed
        )

    assert torch.equal(injections(3), injections(3))
    assert (injections(3) - injections(300)).abs().mean() > 0.05
    assert (injections(3)[0] - injections(3)[1]).abs().mean() > 0.05
    twice = IMAGES[:1].expand(2, -1, -1, -1)
    first, second = denoised_injections(twice, PATHS["epsilon"], nonlinear, index=300, sampling_indices=GRID)[0]
    assert (first - second).abs().mean() > 0.05


def test_where_nothing_is_left_of_the_image_there_is_nothing_to_restore():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    path = GaussianPath.from_scheduler(scheduler)
    with pytest.raises(ValueError, match="nothing of the image"):
        denoised_injections(IMAGES, path, nonlinear, index=len(path) - 1, sampling_indices=GRID)

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from siss_diffusers.noising import PREDICTION_TYPES, GaussianPath, prediction_target


SCHEDULERS = {
    "linear": DDPMScheduler(),
    "scaled_linear": DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "zero terminal SNR": DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "sampler": DDIMScheduler(prediction_type="sample"),
}


def draw(batch=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, noise = (torch.randn(batch, 3, 4, 4, generator=generator) for _ in range(2))
    return sample, noise


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_ddpm_path_is_the_schedulers(scheduler):
    path = GaussianPath.from_scheduler(scheduler)
    sample, noise = draw()
    timesteps = torch.linspace(0, len(path) - 1, 16).long()
    torch.testing.assert_close(
        path.add_noise(sample, noise, timesteps), scheduler.add_noise(sample, noise, timesteps), rtol=1e-6, atol=1e-6
    )
    assert path.model_timesteps[timesteps].equal(timesteps)
    assert path.prediction_type == scheduler.config.prediction_type
    velocity = scheduler.get_velocity(sample, noise, timesteps)
    found = replace(path, prediction_type="v_prediction").target(sample, noise, timesteps)
    torch.testing.assert_close(found, velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_path_is_the_schedulers_even_after_it_sampled(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sample, noise = draw()
    indices = torch.linspace(0, 999, 16).long()
    model_timesteps = scheduler.timesteps.flip(0)[indices]
    expected = scheduler.scale_noise(sample, model_timesteps, noise)
    scheduler.set_timesteps(7)
    path = GaussianPath.from_scheduler(scheduler)
    assert len(path) == 1000 and (path.sigmas.diff() > 0).all()
    torch.testing.assert_close(path.model_timesteps[indices], model_timesteps)
    torch.testing.assert_close(path.add_noise(sample, noise, indices), expected)
    torch.testing.assert_close(path.target(sample, noise, indices), noise - sample)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_target_determines_the_sample(prediction_type):
    """The clean sample can be read off the noisy one and the target, so no parametrisation loses anything."""
    sample, noise = (value.double() for value in draw())
    sigma = torch.linspace(0.1, 0.9, 16).double()
    alpha = 1 - sigma if prediction_type == "flow_prediction" else (1 - sigma**2).sqrt()
    target = prediction_target(prediction_type, sample, noise, alpha, sigma)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    noisy = a * sample + s * noise
    recovered = {
        "epsilon": (noisy - s * target) / a,
        "sample": target,
        "v_prediction": a * noisy - s * target,
        "flow_prediction": noisy - s * target,
    }[prediction_type]
    torch.testing.assert_close(recovered, sample)


def test_what_is_not_a_gaussian_path_is_refused():
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        prediction_target("score", *draw(), torch.ones(16), torch.ones(16))
    with pytest.raises(ValueError, match="unknown prediction type"):
        GaussianPath(torch.ones(2), torch.ones(2), torch.arange(2), "score")
    with pytest.raises(ValueError, match="object has neither"):
        GaussianPath.from_scheduler(object())
    # It carries `alphas_cumprod` too, of a path that its flow-matching model was never trained on.
    with pytest.raises(ValueError, match="train it with FlowMatchEulerDiscreteScheduler"):
        GaussianPath.from_scheduler(
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        )
    assert len(GaussianPath.from_scheduler(EulerDiscreteScheduler())) == 1000

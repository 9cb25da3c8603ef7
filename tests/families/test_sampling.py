"""Samples: the same for the same seed, whatever the batch; and the samplers that draw them."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from siss_diffusers.families import Conditions, Sampling, Unconditional
from siss_diffusers.families.sampling import latent_sampler


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.2,  # which sampling must switch off
    )


def sample(unet, num_samples=5, prediction_type="epsilon", **options):
    pipeline = DDPMPipeline(unet, DDPMScheduler(prediction_type=prediction_type))
    sampling = Sampling(num_inference_steps=4, **options)
    return Unconditional(3, 8).sample(pipeline, Conditions({}, num_samples), None, sampling)


def test_pictures_in_the_unit_interval(unet):
    images = sample(unet)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05


def test_a_seed_gives_the_same_pictures_again(unet):
    assert torch.equal(sample(unet, seed=3), sample(unet, seed=3))
    assert (sample(unet, seed=3) - sample(unet, seed=300)).abs().mean() > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_neither_the_batch_size_nor_the_number_of_samples_matters(unet, batch_size):
    images = sample(unet, num_samples=5)
    torch.testing.assert_close(sample(unet, num_samples=5, batch_size=batch_size), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample(unet, num_samples=3, batch_size=batch_size), images[:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_is_restored(unet, training):
    unet.train(training)
    sample(unet, num_samples=1)
    assert unet.training == training


def test_a_model_of_another_prediction_type_is_sampled_as_such(unet):
    images = [sample(unet, num_samples=1, prediction_type=name) for name in ("epsilon", "v_prediction", "sample")]
    assert (images[0] - images[1]).abs().mean() > 0.01 and (images[0] - images[2]).abs().mean() > 0.01


def test_samples_have_the_resolution_that_was_asked_for(unet):
    """`DDIMPipeline` would draw them at that of the network, and a validation could not compare them."""
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    assert Unconditional(3, 16).sample(pipeline, Conditions({}, 2), None, Sampling(2)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_latents_are_not_clipped_whatever_sampler_a_pipeline_was_saved_with(scheduler):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config = latent_sampler(scheduler(**betas).config).config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert config.beta_end == 0.012


def test_what_a_configuration_says_is_kept():
    config = latent_sampler(DDIMScheduler(clip_sample=True, set_alpha_to_one=True, steps_offset=0).config).config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (True, True, 0)

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from siss_diffusers.families import Sampling, StableDiffusion
from siss_diffusers.metrics.noise_norm import TextNoiseNorms, first_noise_norm, mean_noise_norm
from siss_diffusers.noising import GaussianPath
from tests.helpers.tiny_sd import build_pipeline


PROMPTS = ["a photograph", "graph a photo photograph", "photo"]
STEPS, GUIDANCE = 4, 7.5


def encode(pipeline, prompts: list[str]) -> torch.Tensor:
    return pipeline.encode_prompt(prompts, "cpu", 1, False)[0].detach()


def record(pipeline, **options) -> TextNoiseNorms:
    with TextNoiseNorms(pipeline.unet, GaussianPath.from_scheduler(pipeline.scheduler)) as norms:
        family = StableDiffusion(channels=3, resolution=16)
        sampling = Sampling(**{"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options})
        family.sample(pipeline, family.embed(pipeline, PROMPTS), family.embed(pipeline, [""]), sampling)
    return norms


@torch.no_grad()
def norms_by_a_loop(pipeline) -> torch.Tensor:
    """Image by image, each half by a call of its own, both turned into noise before they are subtracted."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    empty, rows = encode(pipeline, [""]), []
    for number, prompt in enumerate(encode(pipeline, PROMPTS).unsqueeze(1)):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        rows.append([])
        for timestep in scheduler.timesteps:
            alpha_bar = scheduler.alphas_cumprod[timestep]
            outputs = [pipeline.unet(latents, timestep, embeds).sample for embeds in (empty, prompt)]
            noises = outputs
            if scheduler.config.prediction_type == "v_prediction":
                noises = [alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents for output in outputs]
            rows[-1].append(((noises[1] - noises[0]) ** 2).sum().sqrt())
            guided = outputs[0] + GUIDANCE * (outputs[1] - outputs[0])
            latents = scheduler.step(guided, timestep, latents).prev_sample
    return torch.tensor(rows).T


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_norms_are_those_of_a_loop(prediction_type, batch_size):
    pipeline = build_pipeline(prediction_type)
    found, expected = record(pipeline, batch_size=batch_size).per_step(), norms_by_a_loop(pipeline)
    assert found.shape == (STEPS, len(PROMPTS)) and expected.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mean_noise_norm(found), expected.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first_noise_norm(found), expected[0], rtol=1e-3, atol=1e-5)


def test_batches_of_a_single_step_are_rows():
    assert record(build_pipeline(), batch_size=1, num_inference_steps=1).per_step().shape == (1, len(PROMPTS))


class KeywordNet(nn.Module):
    """Its output is the noisy batch times the prompt."""

    def forward(self, *, timestep, prompt, sample=None, hidden_states=None):
        return ((hidden_states if sample is None else sample) * prompt,)


@pytest.mark.parametrize("name", ["sample", "hidden_states"])
def test_a_network_that_is_called_by_keywords_is_seen(name):
    net, path = KeywordNet(), GaussianPath.from_scheduler(DDIMScheduler())
    noisy, prompt = torch.randn(3, 4, 8, 8), torch.tensor([0.0] * 3 + [1.0, 2.0, 3.0])[:, None, None, None]
    with TextNoiseNorms(net, path) as norms:
        for timestep in (torch.full((6,), 900), torch.tensor(400), 10):
            net(**{name: noisy.repeat(2, 1, 1, 1)}, timestep=timestep, prompt=prompt)
    expected = noisy.flatten(1).norm(dim=1) * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(norms.per_step(), expected.expand(3, -1))


def test_without_guidance_there_is_no_norm():
    with pytest.raises(ValueError, match="guidance"):
        record(build_pipeline(), batch_size=2, guidance_scale=1.0).per_step()


def test_the_hook_is_removed_whatever_happens():
    unet, path = build_pipeline().unet, GaussianPath.from_scheduler(DDIMScheduler())
    with pytest.raises(KeyboardInterrupt), TextNoiseNorms(unet, path) as norms:
        raise KeyboardInterrupt
    latents = torch.zeros(2, 4, 8, 8)
    unet(latents, 10, torch.zeros(2, 24, 16))
    assert not norms.passes and not unet._forward_hooks

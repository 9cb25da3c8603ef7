"""Stable Diffusion XL."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Sampling
from siss_diffusers.families.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`s: two text encoders, and the size and the crop of a picture as further conditions.

    The network is told of every picture that it is whole and of the size that is trained, as the pipeline tells it when
    it samples. So size and crop are equal in all rows, and pictures of different sizes share the condition of their
    prompt: two rows of a pair have the same conditional density, and importance weights stay exact.
    """

    title = "Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    sampler_arguments = {"add_watermarker": False}
    argument_names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    default_guidance_scale = 5.0

    @classmethod
    def check_configs(cls, config: dict, vae_config: dict, flag: str) -> None:
        super().check_configs(config, vae_config, flag)
        if config.get("addition_embed_type") != "text_time":
            raise UsageError(
                f"{flag}: the UNet is not told the size of a picture, as that of Stable Diffusion XL is; use a pipeline of"
                " Stable Diffusion XL"
            )
        if vae_config.get("latents_mean") is not None or vae_config.get("latents_std") is not None:
            raise UsageError(
                f"{flag}: the latents of this model are normalized channel by channel, as those of Playground 2.5, which"
                " is not supported; use a pipeline whose VAE has a scaling_factor alone"
            )

    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with without_overflow(pipeline.vae):
            return super().encode(pipeline, pixels)

    def decode(self, pipeline, samples: Tensor) -> Tensor:
        with without_overflow(pipeline.vae):
            return super().decode(pipeline, samples)

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        # Height and width before the crop, its top and left corner, height and width after it.
        side = self.resolution
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=noisy.dtype, device=noisy.device)
        added = {"text_embeds": conditions.tensors["text_embeds"], "time_ids": time_ids.expand(len(noisy), -1)}
        states = conditions.tensors["encoder_hidden_states"]
        return network(noisy, timesteps, states, added_cond_kwargs=added).sample

    def sample(
        self,
        pipeline,
        conditions: Conditions,
        unconditional: Conditions,
        sampling: Sampling,
        progress: str | None = None,
    ) -> Tensor:
        if pipeline.config.force_zeros_for_empty_prompt:
            # Its guidance steers away from zeros, not from the embedding of the empty prompt.
            zeros = {name: torch.zeros_like(tensor) for name, tensor in unconditional.tensors.items()}
            unconditional = Conditions(zeros, len(unconditional))
        return super().sample(pipeline, conditions, unconditional, sampling, progress)


@contextmanager
def without_overflow(vae) -> Iterator[None]:
    """Run a VAE in float32 inside if it overflows in float16, as the pipeline does when it decodes."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)

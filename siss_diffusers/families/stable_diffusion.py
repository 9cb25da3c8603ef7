"""Stable Diffusion 1.x and 2.x."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Family, PipelineSource, Sampling, silenced
from siss_diffusers.families.sampling import latent_sampler, sample_in_batches


EMBEDDING_BATCH = 32


@dataclass(frozen=True)
class StableDiffusion(Family):
    """`StableDiffusionPipeline`s: a CLIP text encoder, a VAE, and a `UNet2DConditionModel` in latent space."""

    title = "Stable Diffusion 1.x or 2.x"
    has_prompts = True
    has_latents = True
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    frozen_components = ("vae", "text_encoder")

    @classmethod
    def fits(cls, pipeline_config: dict) -> bool:
        return pipeline_config["_class_name"] == "StableDiffusionPipeline"

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "StableDiffusion":
        unet_config, vae_config = source.component_config("unet"), source.component_config("vae")
        side = choose_resolution(resolution, unet_config, vae_config)
        channels, latent_channels = unet_config["in_channels"], vae_config["latent_channels"]
        if channels != latent_channels:
            raise UsageError(
                f"{source.flag}: the UNet takes {channels} channels and the VAE makes {latent_channels}; inpainting and"
                " other conditioned models are not supported yet"
            )
        return cls(3, side)

    @torch.no_grad()
    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def latent_scaling(self, pipeline) -> Callable[[Tensor], Tensor]:
        return partial(operator.mul, pipeline.vae.config.scaling_factor)  # which other processes can unpickle

    @torch.no_grad()
    def decode(self, pipeline, samples: Tensor) -> Tensor:
        latents = (samples / pipeline.vae.config.scaling_factor).to(pipeline.vae.dtype)
        # Not under the autocast of a training: as in `siss evaluate`.
        with torch.autocast(latents.device.type, enabled=False):
            return (pipeline.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def token_ids(self, pipeline, prompts: Sequence[str]) -> tuple[list[tuple], list[bool]]:
        length = self.max_prompt_tokens(pipeline)
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        seen = pipeline.tokenizer(list(prompts), **padded).input_ids
        whole = pipeline.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [tuple(ids) for ids in seen], [len(ids) > length for ids in whole]

    def max_prompt_tokens(self, pipeline) -> int:
        length, places = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings
        if length > places:  # without its configuration, a tokenizer of transformers has no limit
            raise UsageError(
                f"the tokenizer of the pipeline allows longer prompts than the {places} tokens of the text encoder; repair"
                f' tokenizer/tokenizer_config.json, where "model_max_length" must be {places}'
            )
        return length

    @torch.no_grad()
    def embed(self, pipeline, prompts: Sequence[str]) -> Conditions:
        prompts = list(prompts)
        with silenced():
            parts = [
                pipeline.encode_prompt(
                    prompts[start : start + EMBEDDING_BATCH], pipeline.text_encoder.device, 1, False
                )
                for start in range(0, len(prompts), EMBEDDING_BATCH)
            ]
        return Conditions({"encoder_hidden_states": torch.cat([embeds for embeds, _ in parts])}, len(prompts))

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return network(noisy, timesteps, conditions.tensors["encoder_hidden_states"]).sample

    def sample(
        self,
        pipeline,
        conditions: Conditions,
        unconditional: Conditions | None,
        sampling: Sampling,
        progress: str | None = None,
    ) -> Tensor:
        from diffusers import StableDiffusionPipeline

        sampler = StableDiffusionPipeline(
            vae=pipeline.vae,
            text_encoder=None,
            tokenizer=None,
            unet=pipeline.unet,
            scheduler=latent_sampler(pipeline.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        sampler.set_progress_bar_config(disable=True)
        embeds = conditions.tensors["encoder_hidden_states"]
        negative = unconditional.tensors["encoder_hidden_states"]

        def draw(rows: slice, generators: list[torch.Generator]) -> Tensor:
            latents = sampler(
                prompt_embeds=embeds[rows],
                negative_prompt_embeds=negative.expand(len(generators), -1, -1),
                generator=generators,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                height=self.resolution,
                width=self.resolution,
                output_type="latent",
            ).images
            return self.decode(pipeline, latents)

        return sample_in_batches(draw, len(conditions), sampling, pipeline.unet, progress)


def choose_resolution(resolution: int | None, unet_config: dict, vae_config: dict) -> int:
    """Return the side of the pictures in pixels: the given one, or the model's own.

    Raises:
        UsageError: for one that the VAE cannot halve as often as it has to, or that pipelines do not take.
    """
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if resolution is None:
        return unet_config["sample_size"] * factor
    multiple = math.lcm(factor, 8)
    if resolution % multiple != 0:
        raise UsageError(f"--resolution {resolution} cannot be used: this model takes multiples of {multiple}")
    return resolution

"""Qwen-Image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions
from siss_diffusers.families.flow_matching import ATTENTION, FlowMatching
from siss_diffusers.families.text_to_image import Normalization, decode_latents


@dataclass(frozen=True)
class QwenImage(FlowMatching):
    """`QwenImagePipeline`s: a Qwen2.5-VL, and a `QwenImageTransformer2DModel`. The VAE is one of videos, of which a picture
    is one frame."""

    title = "Qwen-Image"
    pipeline_class = "QwenImagePipeline"
    lora_targets = ATTENTION
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    argument_names = {"encoder_hidden_states": "prompt_embeds", "encoder_hidden_states_mask": "prompt_embeds_mask"}
    default_guidance_scale = 4.0
    max_sequence_length = 512  # without the template

    @classmethod
    def check_configs(cls, config: dict, vae_config: dict, flag: str) -> None:
        super().check_configs(config, vae_config, flag)
        if config.get("guidance_embeds"):
            raise UsageError(
                f"{flag}: the transformer is told a guidance scale, as models with distilled guidance are, which is not"
                " supported for Qwen-Image; use the model that it was distilled from"
            )

    @classmethod
    def packed_channels(cls, vae_config: dict) -> int:
        return 4 * vae_config["z_dim"]

    @classmethod
    def pixels_per_latent(cls, vae_config: dict) -> int:
        return 2 ** len(vae_config["temperal_downsample"])

    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode(pipeline, pixels[:, :, None])
        return mean[:, :, 0], deviation[:, :, 0]

    def normalization(self, vae) -> Normalization:
        mean, deviation = (
            torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return Normalization(1 / deviation, mean)

    @torch.no_grad()
    def decode(self, pipeline, samples: Tensor) -> Tensor:
        latents = self.normalization(pipeline.vae).inverse(samples)
        return decode_latents(pipeline.vae, latents[:, :, None])[:, :, 0]

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, mask = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        if mask is None:  # where all of the batch are equally long
            mask = states.new_ones(states.shape[:2], dtype=torch.long)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        from diffusers import QwenImagePipeline

        batch, channels, height, width = noisy.shape
        output = network(
            QwenImagePipeline._pack_latents(noisy, batch, channels, height, width),  # (B, H W / 4, 4 C)
            timestep=timesteps,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            **conditions.tensors,
        ).sample
        return QwenImagePipeline._unpack_latents(output, height, width, vae_scale_factor=1)[:, :, 0]

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        arguments = super().sampling_arguments(conditions, unconditional, guidance_scale)
        return arguments | {"true_cfg_scale": arguments.pop("guidance_scale")}

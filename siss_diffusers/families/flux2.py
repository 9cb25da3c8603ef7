"""FLUX.2 klein."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siss_diffusers.families.base import Conditions
from siss_diffusers.families.flow_matching import ATTENTION, FlowMatching, chat_texts
from siss_diffusers.families.text_to_image import Normalization, decode_latents


@dataclass(frozen=True)
class Flux2Klein(FlowMatching):
    """`Flux2KleinPipeline`s: a Qwen3, and a `Flux2Transformer2DModel`.

    Latents are patches of 2 x 2 latents of the VAE, normalized by the running statistics of a batch norm:
    `(B, 4 C, H / 2, W / 2)`. The padding of a prompt is not masked. A distilled klein is sampled without guidance.
    """

    title = "FLUX.2 klein"
    pipeline_class = "Flux2KleinPipeline"
    # `to_out` is a layer in single blocks, and a list of which the first is one in the others.
    lora_targets = (*ATTENTION, "to_qkv_mlp_proj", "attn.to_out")
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    argument_names = {"encoder_hidden_states": "prompt_embeds"}
    default_guidance_scale = 4.0
    max_sequence_length = 512  # with the template

    @classmethod
    def packed_channels(cls, vae_config: dict) -> int:
        return 4 * vae_config["latent_channels"]

    @torch.no_grad()
    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode(pipeline, pixels)
        return pipeline._patchify_latents(mean), pipeline._patchify_latents(deviation)

    def normalization(self, vae) -> Normalization:
        mean, variance = (values.cpu()[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
        return Normalization((variance + vae.config.batch_norm_eps).rsqrt(), mean)

    @torch.no_grad()
    def decode(self, pipeline, samples: Tensor) -> Tensor:
        latents = pipeline._unpatchify_latents(self.normalization(pipeline.vae).inverse(samples))
        return decode_latents(pipeline.vae, latents)

    def texts_of(self, pipeline, prompts: Sequence[str]) -> list[str]:
        return chat_texts(pipeline.tokenizer, prompts, enable_thinking=False)

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds}

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        from diffusers import Flux2KleinPipeline

        states = conditions.tensors["encoder_hidden_states"]
        output = network(
            Flux2KleinPipeline._pack_latents(noisy),  # (B, H W, C)
            timestep=timesteps,
            guidance=None,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(states).to(noisy.device),
            **conditions.tensors,
        ).sample
        return output.transpose(1, 2).unflatten(2, noisy.shape[2:])

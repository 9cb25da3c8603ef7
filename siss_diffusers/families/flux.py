"""FLUX.1 dev and schnell."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from siss_diffusers.families.base import Conditions, PipelineSource
from siss_diffusers.families.flow_matching import JOINT_ATTENTION, FlowMatching


# What dev is told in training, as in the official scripts and in samples at the default.
GUIDANCE = 3.5


@dataclass(frozen=True)
class Flux(FlowMatching):
    """`FluxPipeline`s: the pooled embedding of a CLIP, a T5, and a `FluxTransformer2DModel`.

    Guidance is distilled into the network: dev is told a scale, schnell is not, and neither is called without a prompt.
    No mask hides the padding of a prompt.

    Args:
        guidance_embeds: whether the network is told a guidance scale.
    """

    guidance_embeds: bool = True

    title = "FLUX.1"
    pipeline_class = "FluxPipeline"
    lora_targets = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    argument_names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    default_guidance_scale = GUIDANCE
    max_sequence_length = 512

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "Flux":
        family = super().from_source(source, resolution)
        return replace(family, guidance_embeds=source.component_config(cls.network_name)["guidance_embeds"])

    @classmethod
    def packed_channels(cls, vae_config: dict) -> int:
        return 4 * vae_config["latent_channels"]

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        from diffusers import FluxPipeline

        batch, channels, height, width = noisy.shape
        states = conditions.tensors["encoder_hidden_states"]
        output = network(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),  # (B, H W / 4, 4 C)
            timestep=timesteps,
            guidance=noisy.new_full((batch,), GUIDANCE) if self.guidance_embeds else None,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
            txt_ids=noisy.new_zeros(states.shape[1], 3),
            **conditions.tensors,
        ).sample
        return FluxPipeline._unpack_latents(output, height, width, vae_scale_factor=1)

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        prompted = {argument: conditions.tensors[name] for name, argument in self.argument_names.items()}
        return {"guidance_scale": guidance_scale} | prompted

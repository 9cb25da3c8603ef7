"""Stable Diffusion 3 and 3.5."""

from dataclasses import dataclass

from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, PipelineSource
from siss_diffusers.families.flow_matching import JOINT_ATTENTION, FlowMatching


@dataclass(frozen=True)
class StableDiffusion3(FlowMatching):
    """`StableDiffusion3Pipeline`s: two CLIPs and a T5, and an `SD3Transformer2DModel`.

    No mask hides the padding of a prompt: the network sees its embeddings, so equal token ids are one condition.
    """

    title = "Stable Diffusion 3 or 3.5"
    pipeline_class = "StableDiffusion3Pipeline"
    lora_targets = JOINT_ATTENTION
    frozen_components = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    argument_names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    default_guidance_scale = 7.0
    max_sequence_length = 256  # the official script trains with 77

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "StableDiffusion3":
        family = super().from_source(source, resolution)
        config = source.component_config(cls.network_name)
        largest = (
            config["pos_embed_max_size"] * config["patch_size"] * cls.pixels_per_latent(source.component_config("vae"))
        )
        if family.resolution > largest:
            raise UsageError(
                f"--resolution {family.resolution} cannot be used: this model knows the positions of {largest} pixels"
            )
        return family

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return network(noisy, timestep=timesteps, **conditions.tensors).sample

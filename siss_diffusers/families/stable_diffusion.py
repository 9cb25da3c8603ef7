"""Stable Diffusion 1.x and 2.x."""

from dataclasses import dataclass

from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions
from siss_diffusers.families.text_to_image import TextToImage


@dataclass(frozen=True)
class StableDiffusion(TextToImage):
    """`StableDiffusionPipeline`s: a CLIP text encoder, a VAE, and a `UNet2DConditionModel` in latent space."""

    title = "Stable Diffusion 1.x or 2.x"
    pipeline_class = "StableDiffusionPipeline"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    # A picture that the safety checker blacks out could not be compared.
    sampler_arguments = {"requires_safety_checker": False}
    argument_names = {"encoder_hidden_states": "prompt_embeds"}
    default_guidance_scale = 7.5

    @classmethod
    def check_configs(cls, config: dict, vae_config: dict, flag: str) -> None:
        super().check_configs(config, vae_config, flag)
        if config.get("time_cond_proj_dim"):
            raise UsageError(
                f"{flag}: the UNet is told a guidance scale, as latent consistency models are, which is not supported;"
                " use the model that it was distilled from"
            )

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
        return {"encoder_hidden_states": embeds}

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return network(noisy, timesteps, conditions.tensors["encoder_hidden_states"]).sample

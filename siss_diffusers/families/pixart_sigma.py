"""PixArt-Sigma."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions
from siss_diffusers.families.text_to_image import TextToImage


@dataclass(frozen=True)
class PixArtSigma(TextToImage):
    """`PixArtSigmaPipeline`s: a T5, and a `PixArtTransformer2DModel` that answers the noise and a variance, which is not
    trained. diffusers loads no adapters into it."""

    title = "PixArt-Sigma"
    pipeline_class = "PixArtSigmaPipeline"
    network_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    argument_names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    default_guidance_scale = 4.5
    patch = 2
    max_sequence_length = 300

    @classmethod
    def check_configs(cls, config: dict, vae_config: dict, flag: str) -> None:
        super().check_configs(config, vae_config, flag)
        if config.get("use_additional_conditions"):
            raise UsageError(
                f"{flag}: the transformer is told the size of a picture, as that of PixArt-Alpha, which is not supported;"
                " use PixArt-Sigma"
            )

    def texts_of(self, pipeline, prompts: Sequence[str]) -> list[str]:
        return [prompt.lower().strip() for prompt in prompts]

    def token_limit(self, pipeline, tokenizer_name: str) -> int:
        return self.max_sequence_length

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        answer = network(noisy, timestep=timesteps, added_cond_kwargs=added, **conditions.tensors).sample
        return answer[:, : noisy.shape[1]]

    def sampling_scheduler(self, scheduler):
        # DDIM takes steps of equal length, which those of its "linspace" are not.
        return type(scheduler).from_config(scheduler.config)

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        arguments = super().sampling_arguments(conditions, unconditional, guidance_scale)
        # Its default, "", may not stand beside negative embeddings.
        return arguments | {"negative_prompt": None, "use_resolution_binning": False}

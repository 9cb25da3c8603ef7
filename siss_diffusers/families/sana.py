"""Sana."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from siss_diffusers.families.base import Conditions, PipelineSource
from siss_diffusers.families.flow_matching import FlowMatching


@dataclass(frozen=True)
class Sana(FlowMatching):
    """`SanaPipeline`s: a Gemma2, a deep compression autoencoder without a posterior, and a `SanaTransformer2DModel`.

    The pipeline puts an instruction before every prompt but that of guidance. So here the empty prompt has none.

    Args:
        timestep_scale: by which the scheduler's timesteps are multiplied before the network is told them.
    """

    timestep_scale: float = 1.0

    title = "Sana"
    pipeline_class = "SanaPipeline"
    lora_targets = ("to_k", "to_q", "to_v")
    frozen_components = ("vae", "text_encoder")
    tokenizers = ("tokenizer",)
    argument_names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    default_guidance_scale = 4.5
    sees_case = False  # the pipeline makes prompts lower case
    schedulers = "a flow-matching DPMSolverMultistepScheduler or a FlowMatchEulerDiscreteScheduler"
    patch = 1
    max_sequence_length = 300

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "Sana":
        family = super().from_source(source, resolution)
        return replace(family, timestep_scale=source.component_config(cls.network_name)["timestep_scale"])

    @classmethod
    def pixels_per_latent(cls, vae_config: dict) -> int:
        return 2 ** (len(vae_config["encoder_block_out_channels"]) - 1)

    @torch.no_grad()
    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent
        return latents, torch.zeros_like(latents)

    @classmethod
    def check_scheduler(cls, scheduler) -> None:
        solves_a_flow = (
            scheduler.config.get("use_flow_sigmas") and scheduler.config.prediction_type == "flow_prediction"
        )
        if not solves_a_flow:
            super().check_scheduler(scheduler)

    @classmethod
    def training_scheduler(cls, scheduler):
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = scheduler.config
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=shift)

    def texts_of(self, pipeline, prompts: Sequence[str]) -> list[str]:
        return [prompt.lower().strip() for prompt in prompts]

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        groups = {True: [], False: []}
        for row, prompt in enumerate(prompts):
            groups[bool(prompt.strip())].append(row)
        parts = []
        for has_words, rows in groups.items():
            if rows:
                embeds, mask, _, _ = pipeline.encode_prompt(
                    [prompts[row] for row in rows],
                    do_classifier_free_guidance=False,
                    device=pipeline.text_encoder.device,
                    max_sequence_length=self.max_sequence_length,
                    complex_human_instruction=instruction if has_words else None,
                )
                parts.append((embeds, mask))
        order = torch.tensor(groups[True] + groups[False]).argsort()
        embeds, masks = (torch.cat(values) for values in zip(*parts))
        order = order.to(embeds.device)
        return {"encoder_hidden_states": embeds[order], "encoder_attention_mask": masks[order]}

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps * self.timestep_scale

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return network(noisy, timestep=timesteps, **conditions.tensors).sample

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        arguments = super().sampling_arguments(conditions, unconditional, guidance_scale)
        # Its default, "", may not stand beside negative embeddings.
        return arguments | {"negative_prompt": None, "use_resolution_binning": False}

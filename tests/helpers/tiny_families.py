"""A tiny pipeline of random weights of every family."""

from collections.abc import Callable
from typing import Any

from siss_diffusers.families import Conditions, StableDiffusion, StableDiffusionXL, Unconditional
from tests.helpers import tiny_ddpm, tiny_sd, tiny_sdxl


# The scheduler is the one that the pipeline is sampled with, or one with `alphas_cumprod`.
BUILDERS: dict[type, Callable[[], Any]] = {
    Unconditional: tiny_ddpm.build_pipeline,
    StableDiffusion: tiny_sd.build_pipeline,
    StableDiffusionXL: tiny_sdxl.build_pipeline,
}
WITH_PROMPTS = [family for family in BUILDERS if family.has_prompts]
WITH_ADAPTERS = [family for family in BUILDERS if family.lora_targets]
PROMPTS = ["a photograph", ""]


def conditions_of(family, pipeline, count: int) -> tuple[Conditions, Conditions | None]:
    """Return so many rows of the first prompt, and those of no prompt."""
    if not family.has_prompts:
        return Conditions({}, count), None
    table = family.embed(pipeline, PROMPTS)
    return table[[0] * count], table[[1]]

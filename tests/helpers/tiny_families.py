"""A tiny pipeline of random weights of every family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from siss_diffusers.families import (
    Conditions,
    Family,
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    Unconditional,
)
from tests.helpers import tiny_ddpm, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline.

    Args:
        build: makes it. Its scheduler is the one that it is sampled with, or one with `alphas_cumprod`.
        resolution: side of its pictures.
        asked: arguments of the pipeline's own call beside those that all take.
        scale: the guidance at which the network alone draws: 1 is no classifier-free guidance, and a network that is
            told its guidance draws at the scale that it is told in training.
    """

    family: type[Family]
    build: Callable[[], Any]
    resolution: int = 16
    asked: tuple[tuple[str, Any], ...] = ()
    scale: float = 1.0


TINY = {
    "Unconditional": Tiny(Unconditional, tiny_ddpm.build_pipeline, 8),
    "StableDiffusion": Tiny(StableDiffusion, tiny_sd.build_pipeline),
    "StableDiffusionXL": Tiny(StableDiffusionXL, tiny_sdxl.build_pipeline),
    "StableDiffusion3": Tiny(StableDiffusion3, tiny_sd3.build_pipeline),
    "Flux": Tiny(Flux, tiny_flux.build_pipeline, scale=3.5),
    "FluxSchnell": Tiny(Flux, tiny_flux.build_schnell),
}
WITH_PROMPTS = [name for name, tiny in TINY.items() if tiny.family.has_prompts]
WITH_ADAPTERS = [name for name, tiny in TINY.items() if tiny.family.lora_targets]
ONE_OF_EACH = [name for name in WITH_PROMPTS if name == TINY[name].family.__name__]
PROMPTS = ["a photograph", ""]


def conditions_of(family, pipeline, count: int) -> tuple[Conditions, Conditions | None]:
    """Return so many rows of the first prompt, and those of no prompt."""
    if not family.has_prompts:
        return Conditions({}, count), None
    table = family.embed(pipeline, PROMPTS)
    return table[[0] * count], table[[1]]

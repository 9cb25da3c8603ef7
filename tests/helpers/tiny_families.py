"""A tiny pipeline of random weights of every family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from diffusers import SanaPipeline

from siss_diffusers.families import (
    Conditions,
    Family,
    Flux,
    Flux2Klein,
    PixArtSigma,
    QwenImage,
    Sana,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    Unconditional,
    ZImage,
)
from tests.helpers import (
    tiny_ddpm,
    tiny_flux,
    tiny_flux2,
    tiny_pixart_sigma,
    tiny_qwen_image,
    tiny_sana,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline.

    Args:
        build: makes it. Its scheduler is the one that it is sampled with, or one with `alphas_cumprod`.
        resolution: side of its pictures.
        guided: arguments of the pipeline's own call of 3 prompts, by which it draws at a guidance scale of 3.
        called: arguments of the pipeline's own call beside those.
        encoded: arguments of its `encode_prompt` for a prompt that is not empty.
        same: another spelling of "a photograph" that is the same condition.
        scale: the guidance at which the network alone draws: 1 is no classifier-free guidance, and a network that is
            told its guidance draws at the scale that it is told in training.
    """

    family: type[Family]
    build: Callable[[], Any]
    resolution: int = 16
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    called: dict[str, Any] = field(default_factory=dict)
    encoded: dict[str, Any] = field(default_factory=dict)
    same: str = "a photograph"
    scale: float = 1.0


BINNING_OFF = {"use_resolution_binning": False}
INSTRUCTION = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
TINY = {
    "Unconditional": Tiny(Unconditional, tiny_ddpm.build_pipeline, 8),
    "StableDiffusion": Tiny(StableDiffusion, tiny_sd.build_pipeline, same="A  Photograph"),
    "StableDiffusionXL": Tiny(StableDiffusionXL, tiny_sdxl.build_pipeline, same="A  Photograph"),
    "StableDiffusion3": Tiny(StableDiffusion3, tiny_sd3.build_pipeline),
    "Flux": Tiny(Flux, tiny_flux.build_pipeline, scale=3.5),
    "FluxSchnell": Tiny(Flux, tiny_flux.build_schnell),
    "Flux2Klein": Tiny(Flux2Klein, tiny_flux2.build_pipeline),
    "QwenImage": Tiny(
        QwenImage, tiny_qwen_image.build_pipeline, guided={"true_cfg_scale": 3.0, "negative_prompt": [""] * 3}
    ),
    "Sana": Tiny(
        Sana,
        tiny_sana.build_pipeline,
        32,
        called=BINNING_OFF,
        encoded={"complex_human_instruction": INSTRUCTION},
        same=" A Photograph ",
    ),
    "PixArtSigma": Tiny(PixArtSigma, tiny_pixart_sigma.build_pipeline, called=BINNING_OFF, same=" A Photograph "),
    "ZImage": Tiny(ZImage, tiny_z_image.build_pipeline, guided={"guidance_scale": 2.0}),
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

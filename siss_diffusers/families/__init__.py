"""Every family of pipelines is one file here and one line in `FAMILIES`."""

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Family, PipelineSource, Sampling
from siss_diffusers.families.sources import LoadedPipeline, NamedPipeline
from siss_diffusers.families.stable_diffusion import StableDiffusion
from siss_diffusers.families.unconditional import Unconditional


FAMILIES: tuple[type[Family], ...] = (Unconditional, StableDiffusion)


def find_family(source: PipelineSource, *, with_prompts: bool | None = None) -> type[Family]:
    """Return the family of a pipeline, from its configuration alone.

    Args:
        with_prompts: accept families with (True) or without (False) prompts only; None accepts both.

    Raises:
        UsageError: naming what is supported, for a pipeline of no family.
    """
    allowed = [family for family in FAMILIES if with_prompts in (None, family.has_prompts)]
    for family in allowed:
        if family.fits(source.pipeline_config):
            return family
    raise UsageError(
        f"{source.flag}: {source.describe()} is a {source.pipeline_config['_class_name']}, which is not supported here;"
        f" use {' or '.join(family.title for family in allowed)}"
    )


__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "LoadedPipeline",
    "NamedPipeline",
    "PipelineSource",
    "Sampling",
    "StableDiffusion",
    "Unconditional",
    "find_family",
]

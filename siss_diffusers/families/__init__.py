"""Every family of pipelines is one file here and one line in `FAMILIES`."""

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Family, PipelineSource, Sampling, silenced
from siss_diffusers.families.flux import Flux
from siss_diffusers.families.flux2 import Flux2Klein
from siss_diffusers.families.pixart_sigma import PixArtSigma
from siss_diffusers.families.qwen_image import QwenImage
from siss_diffusers.families.sana import Sana
from siss_diffusers.families.sources import LoadedPipeline, NamedPipeline
from siss_diffusers.families.stable_diffusion import StableDiffusion
from siss_diffusers.families.stable_diffusion_3 import StableDiffusion3
from siss_diffusers.families.stable_diffusion_xl import StableDiffusionXL
from siss_diffusers.families.unconditional import Unconditional
from siss_diffusers.families.z_image import ZImage


FAMILIES: tuple[type[Family], ...] = (
    Unconditional,
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2Klein,
    QwenImage,
    ZImage,
    Sana,
    PixArtSigma,
)


def find_family(source: PipelineSource, *, with_prompts: bool | None = None) -> type[Family]:
    """Return the family of a pipeline, from its configuration alone.

    Args:
        with_prompts: accept families with (True) or without (False) prompts only; None accepts both.

    Raises:
        UsageError: naming what is supported, for a pipeline of no family, or with noise levels of another kind.
    """
    allowed = [family for family in FAMILIES if with_prompts in (None, family.has_prompts)]
    for family in allowed:
        if family.fits(source.pipeline_config):
            check_named(source, family)
            check_scheduler(source, family)
            return family
    titles = [family.title for family in allowed]
    raise UsageError(
        f"{source.flag}: {source.describe()} is a {source.pipeline_config['_class_name']}, which is not supported here;"
        f" use {', '.join(titles[:-1])}{' or ' * bool(titles[:-1])}{titles[-1]}"
    )


def check_named(source: PipelineSource, family: type[Family]) -> None:
    """Check that a pipeline has every component that training uses.

    Raises:
        UsageError: naming the one that is missing.
    """
    for component in (family.network_name, "scheduler", *family.frozen_components, *family.tokenizers):
        value = source.pipeline_config.get(component)
        if not isinstance(value, list) or len(value) != 2 or None in value:
            raise UsageError(
                f"{source.flag}: {source.describe()} names no {component}, which {family.title} needs; use a whole pipeline"
            )


def check_scheduler(source: PipelineSource, family: type[Family]) -> None:
    """Check that a pipeline draws samples along the noise levels that it would be trained on.

    Raises:
        UsageError: for a solver of another kind of model, or a prediction type that is not known.
    """
    scheduler = source.scheduler()
    try:
        with silenced():
            family.check_scheduler(scheduler)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{source.flag}: {source.describe()} has the scheduler {type(scheduler).__name__}, and {family.title} is"
            f" trained on the noise levels of {family.schedulers} ({error}); name a pipeline with one"
        ) from error


__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "Flux",
    "Flux2Klein",
    "LoadedPipeline",
    "NamedPipeline",
    "PipelineSource",
    "PixArtSigma",
    "QwenImage",
    "Sampling",
    "Sana",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Unconditional",
    "ZImage",
    "find_family",
]

"""Stable Diffusion 1.x and 2.x."""

import math

from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import load_pipeline_class


def check_stable_diffusion(name: str, flag: str, **where: str | None) -> None:
    """
    Raises:
        UsageError: for anything but a Stable Diffusion 1.x or 2.x text-to-image pipeline.
    """
    pipeline_class = load_pipeline_class(name, flag, **where)
    if pipeline_class != "StableDiffusionPipeline":
        raise UsageError(
            f"{flag}: {name} is a {pipeline_class}, which is not supported yet; use a StableDiffusionPipeline"
            " (Stable Diffusion 1.x or 2.x)"
        )


def choose_resolution(resolution: int | None, unet_config: dict, vae_config: dict) -> int:
    """The side of the pictures in pixels: the model's own, or the given one.

    Raises:
        UsageError: for one that the VAE cannot halve as often as it has to, or that pipelines do not take.
    """
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if resolution is None:
        return unet_config["sample_size"] * factor
    multiple = math.lcm(factor, 8)
    if resolution % multiple != 0:
        raise UsageError(f"--resolution {resolution} cannot be used: this model takes multiples of {multiple}")
    return resolution

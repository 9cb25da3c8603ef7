"""Batches of samples with a generator for each of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from siss_diffusers.families.base import Sampling


if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# What DDIM asks for, as Stable Diffusion's own configurations have it.
OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def sample_in_batches(
    draw: Callable[[slice, list[torch.Generator]], Tensor],
    count: int,
    sampling: Sampling,
    network: nn.Module,
    progress: str | None = None,
) -> Tensor:
    """Draw `count` samples; sample i comes from a generator of its own, so that two models can be compared pairwise.

    Args:
        draw: from the rows of a batch and a generator for each of them to pictures `(B, C, H, W)` in [0, 1].
        network: set to evaluation mode meanwhile.
        progress: label of a progress bar; None for none.

    Returns:
        `(count, C, H, W)` float32, on the CPU.
    """
    starts = range(0, count, sampling.batch_size)
    batches = []
    with evaluating(network):
        for start in tqdm(starts, desc=progress, disable=progress is None or len(starts) < 2):
            rows = slice(start, min(start + sampling.batch_size, count))
            # On the CPU, so that every device starts from the same noise.
            seeds = range(sampling.seed + rows.start, sampling.seed + rows.stop)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            batches.append(draw(rows, generators).float().cpu())
    return torch.cat(batches)


def latent_sampler(config: Mapping[str, Any]) -> "DDIMScheduler":
    """Return the DDIM scheduler of a latent model with this configuration of a scheduler.

    That of a sampler of another kind, such as Euler's, says nothing of clipping, and DDIM's own defaults are for pixels:
    latents would be clipped to [-1, 1], and the last step would go to a noise level that was never trained on.
    """
    from diffusers import DDIMScheduler

    if "clip_sample" in config:
        return DDIMScheduler.from_config(config)
    return DDIMScheduler.from_config(config, **OF_LATENTS)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set a network to evaluation mode inside, and back to what it was."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)

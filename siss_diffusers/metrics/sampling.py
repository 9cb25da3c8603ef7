"""Samples from a model, the same for the same seed whatever the batch size."""

import torch
from torch import Tensor
from tqdm.auto import tqdm


def sample_images(
    unet,
    scheduler,
    num_samples: int,
    *,
    seed: int = 0,
    num_inference_steps: int = 50,
    batch_size: int = 256,
    progress: str | None = None,
) -> Tensor:
    """Deterministic DDIM samples; sample i comes from a generator of its own, so two models can be compared pairwise.

    Args:
        unet: a `UNet2DModel`.
        scheduler: the model's; its configuration makes a `DDIMScheduler`.
        progress: label of a progress bar; None for none.

    Returns:
        `(num_samples, C, H, W)` float32 in [0, 1], on the CPU.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    training = unet.training
    unet.eval()
    for start in tqdm(range(0, num_samples, batch_size), desc=progress, disable=progress is None):
        # On the CPU, so that every device starts from the same noise.
        generators = [
            torch.Generator().manual_seed(seed + index) for index in range(start, min(start + batch_size, num_samples))
        ]
        images = pipeline(
            batch_size=len(generators),
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    unet.train(training)
    return torch.cat(batches)


def sample_prompts(
    pipeline,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    *,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    resolution: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """Deterministic DDIM samples of a Stable Diffusion pipeline; sample i comes from a generator of its own.

    Args:
        pipeline: a `StableDiffusionPipeline`; its text encoder is not used and may be None, its scheduler is replaced.
        prompt_embeds: `(N, L, D)`, one sample for each, as from `pipeline.encode_prompt`.
        negative_prompt_embeds: `(1, L, D)`, of the empty prompt.
        progress: label of a progress bar; None for none.

    Returns:
        `(N, 3, H, W)` float32 in [0, 1], on the CPU.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sampler = StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=None,
        tokenizer=None,
        unet=pipeline.unet,
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    sampler.set_progress_bar_config(disable=True)
    training = pipeline.unet.training
    pipeline.unet.eval()
    batches = []
    for start in tqdm(range(0, len(prompt_embeds), batch_size), desc=progress, disable=progress is None):
        embeds = prompt_embeds[start : start + batch_size]
        images = sampler(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_prompt_embeds.expand(len(embeds), -1, -1),
            # On the CPU, so that every device starts from the same noise.
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(embeds))],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            output_type="pt",
        ).images
        batches.append(images.float().cpu())
    pipeline.unet.train(training)
    return torch.cat(batches)

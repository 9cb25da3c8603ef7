"""Samples from an unconditional model, the same for the same seed whatever the batch size."""

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

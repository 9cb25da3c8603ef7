"""The relearning attack: does ordinary fine-tuning on similar images bring the copies back?"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siss_diffusers.metrics.base import Probe, Skip
from siss_diffusers.noising import GaussianPath
from siss_diffusers.similarity import for_detectors, pixel_l2


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

NUM_POINTS, BATCH = 4, 16
MICRO_BATCH = 4  # of Stable Diffusion 1.x in float32, 16 images would take 28 GiB of activations
NUM_NEIGHBORS = 64
MAX_GRAD_NORM = 1.0


def nearest_images(keep: Tensor, references: Tensor, count: int = NUM_NEIGHBORS) -> Tensor:
    """Return the rows `(count,)` of the images to keep that are nearest to any reference, in pixel L2.

    Args:
        keep: `(M, C, H, W)` in [0, 1].
        references: `(K, C, H, W)` in [0, 1].
    """
    return pixel_l2(for_detectors(keep), for_detectors(references)).argsort()[:count]


def fine_tune(
    network: nn.Module,
    path: GaussianPath,
    clean: Tensor,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    look: Callable[[int], None],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    micro_batch: int,
    seed: int,
) -> None:
    """Train all weights of a network by the ordinary loss. The network stays in training mode.

    Args:
        path: the noise levels, on the CPU.
        clean: `(N, ...)`, the training set as the network sees it.
        predict: `(noisy, indices into the path, rows of clean) -> output`.
        look: called with the number of steps done: at 0, at about every quarter of the steps, and at the end.
        micro_batch: rows of a network call; the steps are the same for any.
    """
    every = max(num_steps // NUM_POINTS, 1)
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, fused=True)
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            look(step)
        if step == num_steps:
            break
        # On the CPU, so that every device draws the same.
        rows = torch.randint(len(clean), (batch_size,), generator=generator)
        indices = torch.randint(len(path), (batch_size,), generator=generator)
        batch = clean[rows].cpu()
        noise = torch.randn(batch.shape, generator=generator)
        noisy, target = path.add_noise(batch, noise, indices), path.target(batch, noise, indices)
        parts = (tensor.split(micro_batch) for tensor in (noisy, target, indices, rows))
        for noisy_part, target_part, *numbers in zip(*parts):
            output = predict(noisy_part.to(device), *numbers)
            loss = F.mse_loss(output.float(), target_part.to(output.device))
            (loss * len(target_part) / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def _relearning(model: "MeasuredModel") -> dict[str, Any]:
    data, settings = model.data, model.settings
    if settings.relearning_steps == 0:
        raise Skip("needs --relearning_steps")
    if data.keep_prompts is None:
        raise Skip("no image to keep has the prompt of a forget image")
    if model.base is None:
        return {}
    conditions = model.embed(data.prompts)
    model.prepare_training()
    neighbors = nearest_images(data.keep, data.forget)
    prompts = data.keep_prompts[neighbors]
    points: list[dict] = []

    def predict(noisy: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        return model.predict(noisy, model.path.model_timesteps[indices], conditions[prompts[rows]])

    def look(step: int) -> None:
        samples, _ = model.sample(data.prompts, settings.num_relearning_samples)
        points.append({"step": step} | model.count_copies(samples))

    fine_tune(
        model.network,
        model.path,
        model.encode(data.keep[neighbors]),
        predict,
        look,
        num_steps=settings.relearning_steps,
        learning_rate=settings.relearning_rate,
        batch_size=BATCH,
        micro_batch=min(MICRO_BATCH, settings.batch_size),
        seed=settings.seed,
    )
    return {"relearning": points}


RELEARNING = Probe(
    key="relearning",
    label="Relearning",
    explanation=(
        "The model is trained further on images that resemble the forgotten ones, and the copies are counted on the"
        " way. A curve that rises points to an image that was hidden rather than forgotten. Lower and flatter is better."
    ),
    measure=_relearning,
    changes_model=True,
)

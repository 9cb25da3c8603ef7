"""Search of the text-embedding space for a condition under which a network denoises a given image.

The attack of "Finding Dori" (arXiv 2507.16880): Adam on the conditioning alone, with fresh noise and a fresh timestep in
every row, so that what is found works from any seed. A prompt that no longer gives an image says little; a search that
finds no condition that gives it says more.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.draws import EMBEDDING_SEARCH, keyed_generator
from siss_diffusers.noising import GaussianPath, loss_weights, mean_squared_error


# As published.
LEARNING_RATE = 0.1
ROWS_PER_SEARCH = 8  # draws of noise and timestep in a step

# From noisy samples (R, C, H, W), model timesteps (R,) and tensors of R rows to the network's output (R, C, H, W).
Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def search_draws(
    key: Sequence[int], step: int, shape: Sequence[int], num_timesteps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw noise `(ROWS_PER_SEARCH, *shape)` and timesteps `(ROWS_PER_SEARCH,)`, indices into the path, of one step.

    Args:
        key: which search.
    """
    generator = keyed_generator(seed, EMBEDDING_SEARCH, *key, step)
    timesteps = torch.from_numpy(generator.integers(num_timesteps, size=ROWS_PER_SEARCH))
    return torch.from_numpy(generator.standard_normal((ROWS_PER_SEARCH, *shape), dtype=np.float32)), timesteps


def gaussian_like(tensors: Mapping[str, Tensor], seed: int, purpose: int, *key: int) -> dict[str, Tensor]:
    """Return floating tensors drawn anew from N(0, s^2), s the standard deviation of each; others as they are."""
    generator = keyed_generator(seed, purpose, *key)

    def drawn(tensor: Tensor) -> Tensor:
        noise = torch.from_numpy(generator.standard_normal(tuple(tensor.shape), dtype=np.float32))
        return (tensor.float().std() * noise.to(tensor.device)).to(tensor.dtype)

    return {name: drawn(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def search_gradient(
    predict: Predict,
    path: GaussianPath,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    tensors: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the denoising loss of each search, and its gradient in the condition of that search.

    The loss is that of training: the squared error of the network's output, a mean over pixels and over the K draws.

    Args:
        predict: the network.
        path: the noise levels, on the device of `images`.
        images: `(S, C, H, W)`, what each of S searches looks for, as the network sees it.
        noise: `(S, K, C, H, W)`.
        timesteps: `(S, K)`, indices into the path.
        tensors: the conditions, `(S, ...)` each.

    Returns:
        Losses `(S,)`, and gradients `(S, ...)` of the floating tensors by name.
    """
    count = noise.shape[1]
    sought = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if tensor.is_floating_point()}
    with torch.enable_grad():
        rows = {name: tensor.repeat_interleave(count, dim=0) for name, tensor in (dict(tensors) | sought).items()}
        clean, noise, timesteps = images.repeat_interleave(count, dim=0), noise.flatten(0, 1), timesteps.flatten()
        output = predict(path.add_noise(clean, noise, timesteps), path.model_timesteps[timesteps], rows)
        losses = mean_squared_error(output, path.target(clean, noise, timesteps))
        weights = loss_weights(path, timesteps, None)
        losses = (losses if weights is None else losses * weights).unflatten(0, (-1, count)).mean(1)
        # Searches share no tensor, so the gradient of the sum holds that of each.
        gradients = torch.autograd.grad(losses.sum(), list(sought.values()))
    return losses.detach(), dict(zip(sought, gradients))


def search_embeddings(
    predict: Predict,
    path: GaussianPath,
    images: Tensor,
    start: Mapping[str, Tensor],
    keys: Sequence[Sequence[int]],
    *,
    marks: Sequence[int],
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> list[dict[str, Tensor]]:
    """Search conditions by Adam on every floating-point tensor, several searches in one batch.

    Adam goes element by element, so each search is as it would be alone, but for rounding.

    Args:
        predict: the network, with its weights frozen or not: they get no gradient.
        path: the noise levels, on the device of `images`.
        images: `(S, C, H, W)`, what each search looks for.
        start: the conditions to begin with, `(S, ...)` each.
        keys: of the draws of each search.
        marks: numbers of steps after which the conditions are returned, rising.
        seed: of the draws.

    Returns:
        The conditions after each of `marks`: floating tensors in float32, others as they are.
    """
    tensors = {name: t.detach().float() if t.is_floating_point() else t for name, t in start.items()}
    found = {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_floating_point()}
    optimizer = torch.optim.Adam(list(found.values()), lr=learning_rate)
    snapshots = []
    for step in range(1, marks[-1] + 1):
        draws = [search_draws(key, step, images.shape[1:], len(path), seed) for key in keys]
        noise, timesteps = (torch.stack(parts).to(images.device) for parts in zip(*draws))
        _, gradients = search_gradient(predict, path, images, noise, timesteps, tensors | found)
        for name, tensor in found.items():
            tensor.grad = gradients[name]
        optimizer.step()
        if step in marks:
            snapshots.append({name: tensor.detach().clone() for name, tensor in (tensors | found).items()})
    return snapshots

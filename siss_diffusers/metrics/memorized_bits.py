"""Bits of an image that the base knew and the unlearned model does not, from denoising errors; for every kind of model.

For exact denoisers (Kong et al., Information-Theoretic Diffusion, ICLR 2023, arXiv 2302.03792), with l = log(alpha^2 / sigma^2)

    log p_B(a) - log p_U(a) = 1/2 Int E[ |eps - eps_U(a_l)|^2 - |eps - eps_B(a_l)|^2 ] dl

over the noise levels that the model knows. So it is the likelihood at the least of them, a mean over its noise: a model that
memorized an image to the pixel has a peak there that is as wide as this noise. Both models see the same noise and levels
(common random numbers), so equal models differ by exactly 0.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from siss_diffusers.draws import DENOISING_ERROR, keyed_generator
from siss_diffusers.metrics.base import Metric, Probe, Skip
from siss_diffusers.metrics.embedding_attack import turned
from siss_diffusers.noising import GaussianPath


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel

MAX_CONTROLS = 8  # pictures never seen, and images to keep, that are measured beside the forget images
NUM_DRAWS = 128  # for each image and condition; even, for the standard error goes by pairs


def level_widths(path: GaussianPath) -> Tensor:
    """Return the width in l = log(alpha^2 / sigma^2) of the cell of each noise level, `(T,)` float64, by the trapezoidal
    rule; 0 where l is infinite."""
    log_snr = 2 * (path.alphas.double() / path.sigmas.double()).log().cpu()
    usable = torch.isfinite(log_snr).nonzero().flatten()
    gaps = (log_snr[usable][:-1] - log_snr[usable][1:]) / 2
    widths = torch.zeros(len(path), dtype=torch.float64)
    widths[usable[:-1]] += gaps
    widths[usable[1:]] += gaps
    return widths


def level_draws(widths: Tensor, num_draws: int, shape: torch.Size, seed: int, *key: int) -> tuple[Tensor, Tensor]:
    """Draw levels `(K,)`, indices into the path, and noise `(K, *shape)` for one image.

    The levels are stratified in l: one in each of K strata of equal width, in their order.
    """
    generator = keyed_generator(seed, DENOISING_ERROR, *key)
    places = (np.arange(num_draws) + generator.random(num_draws)) / num_draws * widths.sum().item()
    levels = torch.searchsorted(widths.cumsum(0), torch.from_numpy(places)).clamp(max=len(widths) - 1)
    return levels, torch.from_numpy(generator.standard_normal((num_draws, *shape), dtype=np.float32))


def noise_error_scale(path: GaussianPath) -> Tensor:
    """Return by what an error of the network's output is multiplied to be one of the predicted noise, `(T,)`."""
    alphas, sigmas = path.alphas, path.sigmas
    if path.prediction_type == "epsilon":
        return torch.ones_like(alphas)
    if path.prediction_type == "sample":
        return alphas / sigmas
    if path.prediction_type == "v_prediction":
        return alphas / (alphas**2 + sigmas**2)
    return alphas  # flow: eps_hat = m + alpha v


@torch.no_grad()
def denoising_errors(
    images: Tensor,
    path: GaussianPath,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    num_draws: int = NUM_DRAWS,
    batch_size: int = 32,
    seed: int = 0,
    first_key: int = 0,
) -> Tensor:
    """Return `|eps - eps_hat|^2`, summed over pixels, of K draws of level and noise for each image, `(N, K)` float64.

    Args:
        images: `(N, C, H, W)` as the network sees them.
        path: the noise levels, on the device of `images`.
        predict: the network, `(noisy, model timesteps, numbers of the images) -> output`.
        num_draws: K.
        batch_size: rows of a network call.
        seed: of the draws; neither the model nor the other images change those of an image.
        first_key: the key of the first image.
    """
    widths, scale = level_widths(path), noise_error_scale(path)
    errors = torch.empty(len(images), num_draws, dtype=torch.float64)
    for number, image in enumerate(images):
        levels, noise = level_draws(widths, num_draws, image.shape, seed, first_key + number)
        for rows in torch.arange(num_draws).split(batch_size):
            timesteps, drawn = levels[rows].to(images.device), noise[rows].to(images)
            clean = image.expand_as(drawn)
            noisy = path.add_noise(clean, drawn, timesteps)
            output = predict(noisy, path.model_timesteps[timesteps], torch.full((len(rows),), number))
            difference = (output - path.target(clean, drawn, timesteps)).double().flatten(1).square().sum(1)
            errors[number, rows] = (difference * scale[timesteps].double() ** 2).cpu()
    return errors


def bits_between(errors_before: Tensor, errors_after: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Return log2 p_before(a) - log2 p_after(a) of each image, `(N,)`, and its standard error, `(N,)`.

    The error is that of collapsed strata: neighbouring strata differ little, so their difference is noise.

    Args:
        errors_before, errors_after: `(N, K)`, K even, of the same draws.
        width: of all levels together, in log(alpha^2 / sigma^2).
    """
    difference = (errors_after - errors_before) * width / errors_before.shape[1] / (2 * math.log(2))
    pairs = difference.unflatten(1, (-1, 2)).diff(dim=2).squeeze(2)
    return difference.sum(1), pairs.square().sum(1).sqrt()


def _groups(model: "MeasuredModel") -> dict[str, tuple[Tensor, list[int] | None]]:
    """Return pictures by group, and the number of the prompt of each; None where it is not known."""
    data, most = model.data, model.settings.num_likelihood_images
    if most == 0:
        raise Skip("needs --num_likelihood_images above 0")
    count = min(most, MAX_CONTROLS)
    prompts = data.forget_prompts.tolist()
    strangers = [(picture, prompt) for image, prompt in zip(data.forget, prompts) for picture in turned(image)]
    strangers = [(picture, 0) for picture in (() if data.never_seen is None else data.never_seen)] + strangers
    pictures, numbers = zip(*strangers[:count])
    keep_numbers = None if data.keep_prompts is None else data.keep_prompts[:count].tolist()
    return {
        "forget": (data.forget[:most], prompts[:most]),
        "strangers": (torch.stack(pictures), list(numbers)),
        "keep": (data.keep[:count], keep_numbers),
    }


def _errors(model: "MeasuredModel") -> dict[str, dict[str, Tensor]]:
    """Return the denoising errors `(N, K)` by condition and group."""
    settings, path = model.settings, model.path.to(model.device)
    told = {"prompt": model.embed(model.data.prompts), "empty": model.embed([""])}
    if not model.family.has_prompts:
        del told["empty"]
    errors: dict[str, dict[str, Tensor]] = {name: {} for name in told}
    for key, (group, (pictures, prompts)) in enumerate(_groups(model).items()):
        clean = model.encode(pictures)
        for name, table in told.items():
            if name == "prompt" and prompts is None:
                continue
            numbers = torch.tensor(prompts) if name == "prompt" else torch.zeros(len(clean), dtype=torch.long)

            told_to_each = table[numbers]
            errors[name][group] = denoising_errors(
                clean,
                path,
                lambda noisy, timesteps, rows, told=told_to_each: model.predict(noisy, timesteps, told[rows]),
                batch_size=settings.batch_size,
                seed=settings.seed,
                first_key=key * 1_000_000,
            )
    return errors


def _bits(model: "MeasuredModel") -> dict[str, dict[str, float]]:
    """Return by condition the mean bits of each group with their standard errors; empty for the base."""
    after = model.once(_errors)
    if model.base is None:
        return {}
    before, width = model.base.once(_errors), level_widths(model.path).sum().item()
    found: dict[str, dict[str, float]] = {}
    for condition, groups in after.items():
        bits, row = {}, {}
        for group, errors in groups.items():
            bits[group], deviation = bits_between(before[condition][group], errors, width)
            row[group] = bits[group].mean().item()
            row[f"{group}_se"] = deviation.square().sum().sqrt().item() / len(deviation)
        controls = [of_group for group, of_group in bits.items() if group != "forget"]
        if controls:
            row["controls_above"] = (torch.cat(controls)[:, None] >= bits["forget"]).float().mean().item()
        found[condition] = row
    return found


def _memorized_bits(model: "MeasuredModel") -> dict[str, float]:
    bits = model.once(_bits)
    return (
        {"memorized_bits": bits["prompt"]["forget"], "memorized_bits_se": bits["prompt"]["forget_se"]} if bits else {}
    )


def _by_condition(model: "MeasuredModel") -> dict[str, Any]:
    bits = model.once(_bits)
    return {"memorized_bits_by_condition": bits} if bits else {}


MEMORIZED_BITS = Metric(
    key="memorized_bits",
    label="Bits forgotten of an image",
    explanation=(
        "How many bits more the base knew of a forgotten image: log2 of how much likelier it found the image under its"
        " prompt, with the standard error of the draws. What counts is how far it lies above images that nothing was"
        " done to; near 0 the image is as likely as before."
    ),
    measure=_memorized_bits,
    chapter="memory",
    spread="memorized_bits_se",
)
MEMORIZED_BITS_BY_CONDITION = Probe(
    key="memorized_bits_by_condition",
    label="Bits by condition",
    explanation=(
        "The same by condition, the prompt and the empty one, for the forgotten images, for pictures never seen"
        " (strangers) and for images to keep, with standard errors; `controls_above` is the share of comparisons in which"
        " one of the latter two lost at least as many bits. Forgetting under the prompt alone leaves the empty one at 0."
    ),
    measure=_by_condition,
)

"""One model as the metrics see it."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from siss_diffusers.distributed import on_all_processes
from siss_diffusers.evaluation.data import EvaluationData
from siss_diffusers.evaluation.detectors import Detectors
from siss_diffusers.evaluation.networks import Networks
from siss_diffusers.evaluation.searches import search_conditions
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.families import Conditions, Family, Sampling
from siss_diffusers.metrics.base import BLIND, Skip
from siss_diffusers.metrics.broken import broken, finite
from siss_diffusers.metrics.copies import copy_statistics
from siss_diffusers.metrics.embedding_attack import Target
from siss_diffusers.metrics.noise_norm import TextNoiseNorms
from siss_diffusers.noising import GaussianPath


T = TypeVar("T")
# Noise on the prompts must not be the noise that the samples start from.
PROMPT_NOISE_SEED = 2**32


@dataclass(eq=False)
class MeasuredModel:
    """A model, its samples, and what the detectors say of them. Everything is computed on demand, once.

    Args:
        name: for progress bars.
        pipeline: the relearning attack changes it.
        base: the model that this one is compared with; None for the base itself.
    """

    name: str
    pipeline: Any
    family: Family
    data: EvaluationData
    settings: EvaluationSettings
    detectors: Detectors
    networks: Networks
    base: "MeasuredModel | None" = None
    _results: dict[Callable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, compute: "Callable[[MeasuredModel], T]") -> T:
        """Return `compute(self)`, computed at the first call only. Metrics share work by it."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        return self._results[compute]

    def release(self) -> None:
        """Let go of the pipeline, and free its memory for the next one. Samples that were drawn stay."""
        self.pipeline = None
        gc.collect()  # networks are full of cycles
        torch.cuda.empty_cache()  # does nothing without a GPU

    # --- samples

    @cached_property
    def _memorized(self) -> tuple[Tensor, Tensor | None]:
        kind = "Memorized prompts" if self.family.has_prompts else "Samples"
        return self.sample(self.data.prompts, self.settings.num_samples, progress=f"{kind}, {self.name}")

    @cached_property
    def samples(self) -> Tensor:
        """Samples `(N, C, H, W)` in [0, 1] of the memorized prompts."""
        return self._memorized[0]

    @property
    def noise_norms(self) -> Tensor | None:
        """The text-conditional noise norms `(steps, N)` of `samples`; None without guidance."""
        return self._memorized[1]

    @cached_property
    def flags(self) -> dict[str, Tensor]:
        """For each detector which of `samples` are copies."""
        return self.detectors.flags(self.samples)

    @cached_property
    def broken(self) -> Tensor:
        """Which of `samples` are no pictures, `(N,)` bool."""
        return broken(self.samples)

    @property
    def others(self) -> Tensor:
        """Those of `samples` that are no copies, and finite; there may be none."""
        return self.samples[~self.flags["any"] & finite(self.samples)]

    def count_copies(self, samples: Tensor) -> dict[str, Any]:
        """Count the copies among samples, and those that are no pictures, as in `evaluation.json`.

        Raises:
            Skip: where the detectors cannot tell a copy.
        """
        if self.detectors.are_blind:
            raise Skip(BLIND)
        statistics = copy_statistics(self.detectors.flags(samples), broken(samples))
        # A detector that misses the images themselves finds few copies, and that means nothing.
        statistics["copy_share_by_detector"] |= dict.fromkeys(self.detectors.blind)
        return statistics

    @cached_property
    def ordinary_samples(self) -> Tensor:
        """Samples of the ordinary prompts, which take turns; if the model has no prompts, `samples`.

        Raises:
            Skip: if there are no ordinary prompts, or if no samples of them were asked for.
        """
        if not self.family.has_prompts:
            return self.samples
        prompts, count = self.data.ordinary_prompts, self.settings.num_ordinary_samples
        if not prompts or not count:
            raise Skip("there are no other prompts in the training set, or none were asked for")
        return self.sample(prompts, count, progress=f"Ordinary prompts, {self.name}")[0]

    @cached_property
    def ordinary_copies(self) -> Tensor:
        """Which of `ordinary_samples` are copies, `(N,)` bool."""
        return self.detectors.flags(self.ordinary_samples)["any"]

    @cached_property
    def ordinary_broken(self) -> Tensor:
        """Which of `ordinary_samples` are no pictures, `(N,)` bool."""
        return broken(self.ordinary_samples) & ~self.ordinary_copies

    @property
    def ordinary_others(self) -> Tensor:
        """Those of `ordinary_samples` that are no copies, and finite; there may be none."""
        return self.ordinary_samples[~self.ordinary_copies & finite(self.ordinary_samples)]

    def samples_by_kind(self) -> dict[str, Tensor]:
        """Return the samples to look at, by what they are called."""
        if not self.family.has_prompts:
            return {"samples": self.samples}
        try:
            return {"memorized prompt": self.samples, "ordinary prompts": self.ordinary_samples}
        except Skip:
            return {"memorized prompt": self.samples}

    def sample(
        self, prompts: Sequence[str], count: int, *, noise: float = 0.0, progress: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw samples, shared out over all processes. The same sample of two models has the same seed.

        Args:
            prompts: they take turns.
            count: number of samples.
            noise: added to the prompt's embedding, in its standard deviations.
            progress: label of a progress bar; None for none.

        Returns:
            Pictures `(count, C, H, W)` in [0, 1], and the text-conditional noise norm of each at every step,
            `(steps, count)`; None without guidance.
        """
        return self.sample_conditions(self.embed(prompts), count, noise=noise, progress=progress)

    def sample_conditions(
        self,
        table: Conditions,
        count: int,
        *,
        noise: float = 0.0,
        guidance_scale: float | None = None,
        progress: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw samples of conditions, which take turns, as `sample` does of prompts.

        Args:
            guidance_scale: None is that of the settings.
        """
        family, settings = self.family, self.settings
        guidance_scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        unconditional = self.embed([""]) if family.has_prompts else None
        guided = family.has_prompts and guidance_scale > 1

        def draw(start: int) -> tuple[Tensor, Tensor | None]:
            numbers = torch.arange(start, min(start + settings.batch_size, count))
            conditions = table[numbers % len(table)]
            if noise:
                seeds = [PROMPT_NOISE_SEED + settings.seed + number for number in numbers.tolist()]
                conditions = add_prompt_noise(conditions, noise, seeds)
            sampling = Sampling(
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=guidance_scale,
                batch_size=len(numbers),
                seed=settings.seed + start,
            )
            with TextNoiseNorms(self.network, self.path) if guided else nullcontext() as norms:
                pictures = family.sample(self.pipeline, conditions, unconditional, sampling)
            return pictures, norms.per_step() if guided and norms.passes else None

        batches = on_all_processes(draw, range(0, count, settings.batch_size), progress)
        pictures, norms = zip(*batches)
        return torch.cat(pictures), None if norms[0] is None else torch.cat(norms, dim=1)

    def search(self, targets: Sequence[Target], starts: Sequence[str], label: str) -> list[dict[int, Conditions]]:
        """Search conditions for pictures; return those of each start by number of steps, on the CPU."""
        return search_conditions(self, targets, starts, label)

    # --- the network

    @property
    def network(self) -> nn.Module:
        """The component of the pipeline that was trained."""
        return self.family.network(self.pipeline)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @cached_property
    def path(self) -> GaussianPath:
        """The noise levels, on the CPU."""
        return self.family.path(self.pipeline)

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """Return the condition of each prompt; without tensors if the model has no prompts."""
        if not self.family.has_prompts:
            return Conditions({}, len(prompts))
        return self.family.embed(self.pipeline, prompts)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Return the network's output `(B, C, H, W)` in float32, with gradients.

        Args:
            noisy: `(B, C, H, W)`.
            timesteps: `(B,)`, of the path's `model_timesteps`.
            conditions: of B rows; None for models without prompts.
        """
        parameter = next(self.network.parameters())
        if conditions is not None:
            conditions = conditions.to(parameter.device, parameter.dtype)
        noisy, timesteps = noisy.to(parameter.device, parameter.dtype), timesteps.to(parameter.device)
        return self.family.predict(self.network, noisy, timesteps, conditions).float()

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Return pictures `(N, C, H, W)` in [0, 1] as the network sees them, on its device: pixels or mean latents."""
        scale = self.family.latent_scaling(self.pipeline)
        batches = (pictures * 2 - 1).to(self.device).split(self.settings.batch_size)
        return torch.cat([scale(self.family.encode(self.pipeline, batch)[0].float()) for batch in batches])

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Return the pictures `(N, C, H, W)` in [0, 1] of what the network denoised, on the CPU."""
        batches = samples.split(self.settings.batch_size)
        return torch.cat([self.family.decode(self.pipeline, batch).cpu() for batch in batches])

    def prepare_training(self) -> None:
        """Fuse adapters and turn the pipeline to float32, so that all weights can be trained.

        This is what an attacker does who has the weights but cannot take off the adapter.
        """
        if hasattr(self.network, "peft_config"):
            self.pipeline.fuse_lora()
            self.pipeline.unload_lora_weights()
        self.pipeline.to(torch.float32)


def add_prompt_noise(conditions: Conditions, noise: float, seeds: Sequence[int]) -> Conditions:
    """Return conditions with Gaussian noise on the embeddings of the tokens.

    Args:
        noise: standard deviation of the noise, relative to that of each prompt's embedding.
        seeds: of the noise of each row.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tensors = dict(conditions.tensors)
    for key, table in tensors.items():
        if table.ndim == 3 and table.is_floating_point():
            drawn = torch.stack([torch.randn(table.shape[1:], generator=generator) for generator in generators])
            tensors[key] = table + noise * table.std(dim=(1, 2), keepdim=True) * drawn.to(table)
    return Conditions(tensors, len(conditions))

"""What differs between kinds of pipeline: how prompts and pictures reach the network, and how its answer is read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from siss_diffusers.noising import GaussianPath


@dataclass(frozen=True)
class Conditions:
    """What a network is told beside the timestep, a row for each of `size` prompts or samples.

    Args:
        tensors: `(size, ...)` each, under the names that the network has for them. Empty for unconditional models.
        size: number of rows.
    """

    tensors: dict[str, Tensor]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> "Conditions":
        """Select rows, by numbers or by a slice."""
        numbers = rows if isinstance(rows, Tensor) and rows.dtype == torch.long else torch.arange(self.size)[rows]
        return Conditions({name: t[numbers.to(t.device)] for name, t in self.tensors.items()}, len(numbers))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditions":
        """Move all tensors to a device; floating ones also to `dtype`."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        }
        return Conditions(moved, self.size)

    @staticmethod
    def cat(parts: Sequence["Conditions"]) -> "Conditions":
        """Put tables of the same names below each other. Sequences `(size, L, ...)` are padded by zeros at their end to the
        longest; what tells a network where they end is one of the tensors."""

        def joined(tensors: list[Tensor]) -> Tensor:
            if tensors[0].ndim > 1:
                longest, other_axes = max(tensor.shape[1] for tensor in tensors), [0, 0] * (tensors[0].ndim - 2)
                tensors = [nn.functional.pad(t, (*other_axes, 0, longest - t.shape[1])) for t in tensors]
            return torch.cat(tensors)

        tensors = {name: joined([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return Conditions(tensors, sum(len(part) for part in parts))


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Args:
        num_inference_steps: steps of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none. Unconditional models ignore it.
        batch_size: samples at a time.
        seed: of the first sample; sample i has a generator of its own, of seed + i.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 16
    seed: int = 0


class PipelineSource(Protocol):
    """Reads a pipeline in parts, so that a bad configuration is refused before any weights are read.

    Attributes:
        flag: where the name comes from, for messages.
        pipeline_config: the content of `model_index.json`.
        is_ours: whether nobody else uses the pipelines that it loads, so that parts of them can be freed.
    """

    flag: str
    pipeline_config: dict
    is_ours: bool

    def component_config(self, component: str) -> dict:
        """Read the configuration of a component."""

    def scheduler(self) -> Any:
        """Return the scheduler, which has no weights."""

    def load_without_network(self, family: "Family") -> Any:
        """Load the pipeline in float32, its network left out."""

    def load_network(self, family: "Family", pipeline) -> None:
        """Load the network in float32 into the pipeline."""

    def check_rest(self, family: "Family") -> None:
        """Check that everything but the network can be saved beside it, before any weights are read."""

    def save_rest(self, family: "Family", pipeline, folder: Path) -> None:
        """Save everything of the pipeline but its network, whose folder is there, as it was."""

    def network_skeleton(self, family: "Family") -> nn.Module:
        """Return the network for a look at its layers; its weights may be missing."""

    def describe(self) -> str:
        """Return the name for messages."""


@dataclass(frozen=True)
class Family(ABC):
    """A kind of pipeline. It holds no weights: pipelines are passed in.

    Samples `(B, C, H, W)` are what the network denoises: pixels in [-1, 1], or latents in the network's own units.

    Args:
        channels: of pictures.
        resolution: side of pictures in pixels.

    Class attributes:
        title: what users call it.
        network_name: the component that is trained.
        has_prompts: whether it is told a prompt.
        has_latents: whether a VAE stands between pictures and the network.
        lora_targets: layers that get an adapter by default; empty where adapters are not supported.
        frozen_components: components that are used in training beside the network.
        tokenizers: components that turn prompts into token ids.
        default_guidance_scale: of samples, as in the call of the pipeline.
        sees_case: whether prompts in other case are other conditions.
        schedulers: the kind of scheduler that it is sampled with, for messages.
    """

    channels: int
    resolution: int

    title: ClassVar[str]
    network_name: ClassVar[str] = "unet"
    has_prompts: ClassVar[bool] = False
    has_latents: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ()
    frozen_components: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()
    default_guidance_scale: ClassVar[float] = 1.0
    sees_case: ClassVar[bool] = False
    schedulers: ClassVar[str] = "a DDPMScheduler, a DDIMScheduler or another of their kind"

    @classmethod
    @abstractmethod
    def fits(cls, pipeline_config: dict) -> bool:
        """Tell from a `model_index.json` whether a pipeline is of this family."""

    @classmethod
    @abstractmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "Family":
        """Read the configurations of a pipeline, before any weights.

        Args:
            resolution: side of pictures; None is the model's own.

        Raises:
            UsageError: for a network that is not supported, or a resolution that it does not take.
        """

    def width(self, source: PipelineSource) -> int:
        """Return the channels of the network's widest block, which the default learning rate goes by."""
        config = source.component_config(self.network_name)
        if "block_out_channels" in config:
            return max(config["block_out_channels"])
        return config["num_attention_heads"] * config["attention_head_dim"]

    def network(self, pipeline) -> nn.Module:
        """Return the component that is trained."""
        return getattr(pipeline, self.network_name)

    @classmethod
    def training_scheduler(cls, scheduler):
        """Return the scheduler whose noise levels are trained on."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(scheduler.config)

    @classmethod
    def check_scheduler(cls, scheduler) -> None:
        """Check that a scheduler draws samples along the noise levels of `training_scheduler`.

        Raises:
            ValueError, TypeError, NotImplementedError: saying what is different.
        """
        name = type(scheduler).__name__
        drawn = GaussianPath.from_scheduler(scheduler)
        trained = GaussianPath.from_scheduler(cls.training_scheduler(scheduler))
        if scheduler.config.get("use_flow_sigmas"):
            raise ValueError(f"{name} samples a flow-matching model")
        if drawn.prediction_type != trained.prediction_type:
            raise ValueError(f"{name} samples a model of {drawn.prediction_type}, not of {trained.prediction_type}")

    def path(self, pipeline) -> GaussianPath:
        """Return the noise levels; their `model_timesteps` are what the network is told."""
        return GaussianPath.from_scheduler(self.training_scheduler(pipeline.scheduler))

    # --- pictures

    @abstractmethod
    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's posterior of pictures `(B, C, H, W)` in [-1, 1]."""

    @abstractmethod
    def latent_scaling(self, pipeline) -> Callable[[Tensor], Tensor]:
        """Return the map from the VAE's units to those of the network. It outlives the VAE."""

    @abstractmethod
    def decode(self, pipeline, samples: Tensor) -> Tensor:
        """Return pictures `(B, C, H, W)` in [0, 1] of what the network denoised."""

    # --- prompts

    def token_ids(self, pipeline, prompts: Sequence[str]) -> tuple[list[tuple], list[bool]]:
        """Return what the text encoders see of each prompt, equal for prompts that are one condition, and which prompts
        are longer than what they see."""
        raise NotImplementedError(f"{self.title} has no prompts")

    def max_prompt_tokens(self, pipeline) -> int:
        """Return how many tokens of a prompt the text encoders see."""
        raise NotImplementedError(f"{self.title} has no prompts")

    def embed(self, pipeline, prompts: Sequence[str]) -> Conditions:
        """Return the conditions of prompts, by the pipeline's own `encode_prompt`."""
        raise NotImplementedError(f"{self.title} has no prompts")

    # --- the network

    @abstractmethod
    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions | None) -> Tensor:
        """Return the network's output `(B, C, H, W)`, which is trained towards `GaussianPath.target`.

        Args:
            network: the network, or what accelerate made of it.
            timesteps: `(B,)`, of the path's `model_timesteps`.
            conditions: of B rows; None for unconditional models.
        """

    @abstractmethod
    def sample(
        self,
        pipeline,
        conditions: Conditions,
        unconditional: Conditions | None,
        sampling: Sampling,
        progress: str | None = None,
    ) -> Tensor:
        """Draw a sample for each row of `conditions`, the same for the same seed whatever the batch size.

        Args:
            unconditional: one row, that of the empty prompt, which guidance steers away from; None for unconditional
                models.
            progress: label of a progress bar; None for none.

        Returns:
            `(N, C, H, W)` float32 in [0, 1], on the CPU.
        """


@contextmanager
def silenced() -> Iterator[None]:
    """Silence diffusers and transformers inside: they print what they cut off a long prompt, and a prompt may be what
    has to be forgotten."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)

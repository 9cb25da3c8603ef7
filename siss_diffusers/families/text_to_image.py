"""What text-to-image pipelines share: prompts and an autoencoder around a network in latent space."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Family, PipelineSource, Sampling, silenced
from siss_diffusers.families.sampling import latent_sampler, sample_in_batches


EMBEDDING_BATCH = 32


@dataclass(frozen=True)
class Normalization:
    """Map latents `(..., C, H, W)` from the VAE's units to those of the network: `(latents - shift) * scale`.

    It outlives the VAE, and other processes can unpickle it.

    Args:
        scale, shift: numbers, or `(C, 1, 1)` with one for each channel.
    """

    scale: float | Tensor
    shift: float | Tensor = 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        scale, shift = self._beside(latents)
        return (latents - shift) * scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Map latents back to the VAE's units."""
        scale, shift = self._beside(latents)
        return latents / scale + shift

    def _beside(self, latents: Tensor) -> list[float | Tensor]:
        return [value.to(latents) if isinstance(value, Tensor) else value for value in (self.scale, self.shift)]


class TextToImage(Family):
    """A pipeline with text encoders, a VAE, and a network in latent space.

    Class attributes:
        pipeline_class: the `_class_name` of its `model_index.json`.
        sampler_arguments: what the pipeline that draws samples is made with, beside its components and its configuration.
        argument_names: from the names of conditions to those of the arguments of the pipeline's call.
        patch: sides of latents are multiples of it.
    """

    has_prompts = True
    has_latents = True
    pipeline_class: ClassVar[str]
    sampler_arguments: ClassVar[dict[str, Any]] = {}
    argument_names: ClassVar[dict[str, str]]
    patch: ClassVar[int] = 1

    @classmethod
    def fits(cls, pipeline_config: dict) -> bool:
        return pipeline_config["_class_name"] == cls.pipeline_class

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "TextToImage":
        config, vae_config = source.component_config(cls.network_name), source.component_config("vae")
        cls.check_configs(config, vae_config, source.flag)
        factor = cls.pixels_per_latent(vae_config)
        side = choose_resolution(resolution, cls.latent_size(config) * factor, math.lcm(factor * cls.patch, 8))
        return cls(3, side)

    @classmethod
    def check_configs(cls, config: dict, vae_config: dict, flag: str) -> None:
        """Check that network and VAE are of the kind that this family knows.

        Raises:
            UsageError: naming what is not supported.
        """
        channels, latent_channels = config["in_channels"], cls.packed_channels(vae_config)
        if channels != latent_channels:
            network = "UNet" if cls.network_name == "unet" else cls.network_name
            raise UsageError(
                f"{flag}: the {network} takes {channels} channels and the VAE makes {latent_channels}; inpainting and"
                " other conditioned models are not supported yet"
            )

    @classmethod
    def packed_channels(cls, vae_config: dict) -> int:
        """Return the channels that latents have on their way into the network."""
        return vae_config["latent_channels"]

    @classmethod
    def pixels_per_latent(cls, vae_config: dict) -> int:
        """Return how many pixels of a side are one latent."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

    @classmethod
    def latent_size(cls, config: dict) -> int:
        """Return the side of the latents that the network was made for."""
        return config["sample_size"]

    # --- pictures

    @torch.no_grad()
    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def latent_scaling(self, pipeline) -> Callable[[Tensor], Tensor]:
        return self.normalization(pipeline.vae)

    def normalization(self, vae) -> Normalization:
        """Return the map between the units of the VAE and those of the network."""
        return Normalization(vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def decode(self, pipeline, samples: Tensor) -> Tensor:
        return decode_latents(pipeline.vae, self.normalization(pipeline.vae).inverse(samples))

    # --- prompts

    def token_ids(self, pipeline, prompts: Sequence[str]) -> tuple[list[tuple], list[bool]]:
        texts, seen, too_long = self.texts_of(pipeline, prompts), [], []
        for name in self.tokenizers:
            tokenizer, length = getattr(pipeline, name), self.token_limit(pipeline, name)
            padded = {"padding": "max_length", "max_length": length, "truncation": True}
            seen.append(map(tuple, tokenizer(texts, **padded).input_ids))
            whole = tokenizer(texts, truncation=False, verbose=False).input_ids
            too_long.append([len(ids) > length for ids in whole])
        # What one encoder cuts off, another may see.
        return list(zip(*seen)), [all(cut) for cut in zip(*too_long)]

    def texts_of(self, pipeline, prompts: Sequence[str]) -> list[str]:
        """Return what the pipeline hands to its tokenizers."""
        return list(prompts)

    def token_limit(self, pipeline, tokenizer_name: str) -> int:
        """Return how many tokens of this tokenizer its text encoder sees.

        Raises:
            UsageError: for a tokenizer that does not know.
        """
        encoder = getattr(pipeline, tokenizer_name.replace("tokenizer", "text_encoder"))
        length, places = getattr(pipeline, tokenizer_name).model_max_length, encoder.config.max_position_embeddings
        if length > places:  # without its configuration, a tokenizer of transformers has no limit
            raise UsageError(
                f"the {tokenizer_name} of the pipeline allows longer prompts than the {places} tokens of its text encoder;"
                f' repair {tokenizer_name}/tokenizer_config.json, where "model_max_length" must be {places}'
            )
        return length

    def max_prompt_tokens(self, pipeline) -> int:
        return max(self.token_limit(pipeline, name) for name in self.tokenizers)

    @torch.no_grad()
    def embed(self, pipeline, prompts: Sequence[str]) -> Conditions:
        batches = [list(prompts[start : start + EMBEDDING_BATCH]) for start in range(0, len(prompts), EMBEDDING_BATCH)]
        with silenced():
            return Conditions.cat([Conditions(self.encode_prompts(pipeline, batch), len(batch)) for batch in batches])

    def encode_prompts(self, pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """Return what the network is told of a batch of prompts, `(B, ...)` each, under the names of its arguments."""
        raise NotImplementedError

    # --- samples

    def sampling_scheduler(self, scheduler):
        """Return a fresh scheduler that draws samples without noise of its own."""
        return latent_sampler(scheduler.config)

    def sampling_arguments(
        self, conditions: Conditions, unconditional: Conditions, guidance_scale: float
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for samples of conditions, both tables of as many rows."""
        arguments = {"guidance_scale": guidance_scale}
        for name, argument in self.argument_names.items():
            arguments[argument] = conditions.tensors[name]
            arguments[f"negative_{argument}"] = unconditional.tensors[name]
        return arguments

    def sample(
        self,
        pipeline,
        conditions: Conditions,
        unconditional: Conditions | None,
        sampling: Sampling,
        progress: str | None = None,
    ) -> Tensor:
        used = {
            "vae": pipeline.vae,
            self.network_name: self.network(pipeline),
            "scheduler": self.sampling_scheduler(pipeline.scheduler),
        }
        own = {
            name: value
            for name, value in pipeline.config.items()
            if name[0] != "_" and name not in pipeline.components
        }
        sampler = type(pipeline)(**(dict.fromkeys(pipeline.components) | own | used | self.sampler_arguments))
        sampler.set_progress_bar_config(disable=True)

        def draw(rows: slice, generators: list[torch.Generator]) -> Tensor:
            arguments = self.sampling_arguments(
                conditions[rows], unconditional[[0] * len(generators)], sampling.guidance_scale
            )
            with own_precision(pipeline.vae):
                return sampler(
                    generator=generators,
                    num_inference_steps=sampling.num_inference_steps,
                    height=self.resolution,
                    width=self.resolution,
                    output_type="pt",
                    **arguments,
                ).images

        return sample_in_batches(draw, len(conditions), sampling, self.network(pipeline), progress)


@contextmanager
def own_precision(vae) -> Iterator[None]:
    """Let a VAE decode in its own precision inside, not under the autocast of a training: as in `siss evaluate`."""
    decode = vae.decode

    def decode_uncast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            return decode(*args, **kwargs)

    vae.decode = decode_uncast
    try:
        yield
    finally:
        del vae.decode  # which hid the method of the class


def decode_latents(vae, latents: Tensor) -> Tensor:
    """Return pictures in [0, 1] of latents in the units of a VAE."""
    with own_precision(vae):
        return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


def choose_resolution(resolution: int | None, own: int, multiple: int) -> int:
    """Return the side of the pictures in pixels: the given one, or the model's own.

    Raises:
        UsageError: for one that is no multiple of what network, VAE and pipeline take.
    """
    if resolution is not None and resolution % multiple != 0:
        raise UsageError(f"--resolution {resolution} cannot be used: this model takes multiples of {multiple}")
    return resolution or own

"""Unconditional pipelines of a UNet in pixel space, such as `DDPMPipeline`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Conditions, Family, PipelineSource, Sampling
from siss_diffusers.families.sampling import sample_in_batches


@dataclass(frozen=True)
class Unconditional(Family):
    """Pipelines of a `UNet2DModel` and a scheduler."""

    title = "an unconditional model with a UNet2DModel"

    @classmethod
    def fits(cls, pipeline_config: dict) -> bool:
        components = {name for name, value in pipeline_config.items() if isinstance(value, list)}
        return components == {"unet", "scheduler"} and pipeline_config["unet"][1] == "UNet2DModel"

    @classmethod
    def from_source(cls, source: PipelineSource, resolution: int | None = None) -> "Unconditional":
        config = source.component_config("unet")
        channels = config["in_channels"]
        if channels not in (1, 3) or config["out_channels"] != channels:
            raise UsageError(
                f"{source.flag}: the UNet maps {channels} to {config['out_channels']} channels; only images of 1 or 3"
                " channels, mapped to as many, are supported"
            )
        if config.get("num_class_embeds") or config.get("class_embed_type"):
            raise UsageError(
                f"{source.flag}: the UNet is conditioned on classes; only unconditional ones are supported"
            )
        resolution = resolution or config["sample_size"]
        multiple = 2 ** (len(config["block_out_channels"]) - 1)
        if not isinstance(resolution, int) or resolution % multiple != 0:
            raise UsageError(f"--resolution {resolution} cannot be used: this UNet takes multiples of {multiple}")
        return cls(channels, resolution)

    def encode(self, pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, torch.zeros_like(pixels)

    def latent_scaling(self, pipeline) -> Callable[[Tensor], Tensor]:
        return lambda pixels: pixels

    def decode(self, pipeline, samples: Tensor) -> Tensor:
        return samples / 2 + 0.5

    def predict(self, network, noisy: Tensor, timesteps: Tensor, conditions: Conditions | None = None) -> Tensor:
        return network(noisy, timesteps).sample

    def sample(
        self,
        pipeline,
        conditions: Conditions,
        unconditional: Conditions | None,
        sampling: Sampling,
        progress: str | None = None,
    ) -> Tensor:
        from diffusers import DDIMScheduler
        from diffusers.utils.torch_utils import randn_tensor

        unet, scheduler = pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(sampling.num_inference_steps)

        # As `DDIMPipeline`, which knows no resolution but the one that the network was made for.
        @torch.no_grad()
        def draw(rows: slice, generators: list[torch.Generator]) -> Tensor:
            shape = (len(generators), self.channels, self.resolution, self.resolution)
            pictures = randn_tensor(shape, generators, unet.device, unet.dtype)
            for timestep in scheduler.timesteps:
                output = unet(pictures, timestep).sample
                pictures = scheduler.step(output, timestep, pictures, generator=generators).prev_sample
            return (pictures / 2 + 0.5).clamp(0, 1)

        return sample_in_batches(draw, len(conditions), sampling, pipeline.unet, progress)

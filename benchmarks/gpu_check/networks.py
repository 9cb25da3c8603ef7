"""Networks of full size with random weights, batches of random latents, and the step of each variant."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from step_cost_sd import LAM, MAX_GRAD_NORM, PROMPT_LENGTH, keep_posterior, with_posterior_means

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, scaling_rule
from siss_diffusers.families import StableDiffusion
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.settings.shared import DEFAULT_REDIRECT_IMAGES
from siss_diffusers.training.adapters import add_lora


FULL = ("plain", "siss", "siss_lagged", "redirect")
LORA = ("plain_lora", "siss_lora", "redirect_lora")
LAGGED_SCALE = 0.1
FLUX_PROMPT_LENGTH, FLUX_PATCH = 512, 2

Window = list[Query]  # the micro-batches of one optimizer step
Step = Callable[[Window], None]


@dataclass(frozen=True)
class Model:
    """A network by its class and configuration, and the same when narrow.

    Args:
        latents: channels and side of what it denoises.
        batch: pairs per step by default.
        variants: those that may fit a card of 80 GB.
    """

    network: type
    config: dict[str, Any]
    narrow: dict[str, Any]
    latents: tuple[int, int]
    batch: int
    variants: Sequence[str] = FULL + LORA

    def shrunk(self) -> "Model":
        """Return the narrow network, on small latents."""
        return replace(self, config=self.config | self.narrow, latents=(self.latents[0], 8))


NARROW_UNET = {"layers_per_block": 1, "cross_attention_dim": 32, "block_out_channels": (32, 64)}
NARROW_UNET |= {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
MODELS = {
    # 512 pixels. The defaults of the class are Stable Diffusion 1's blocks.
    "sd15": Model(
        UNet2DConditionModel, {"cross_attention_dim": 768, "attention_head_dim": 8}, NARROW_UNET, (4, 64), 16
    ),
    # 1024 pixels.
    "sdxl": Model(
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,  # the pooled prompt and six numbers
        },
        NARROW_UNET
        | {
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        (4, 128),
        4,
    ),
    # 512 pixels. The defaults of the class are Flux.1's; its 12 billion weights are trained by LoRA alone.
    "flux": Model(
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        (16, 64),
        4,
        LORA,
    ),
}


def make_path() -> GaussianPath:
    """Return Stable Diffusion's noise levels. For the cost of a step those of any other model would do."""
    return GaussianPath.from_scheduler(
        DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )


def draw_windows(latents: tuple[int, int], batch: int, micro_batch: int, count: int) -> list[Window]:
    """Draw steps, the same for every variant; exactly half of the pairs take the forget component. A pair shares a prompt:
    were there two, no row would serve both sides, and ours would look cheaper."""
    generator = torch.Generator().manual_seed(0)
    path, (channels, side), windows = make_path(), latents, []
    for _ in range(count):
        keep, forget, noise = torch.randn(3, batch, channels, side, side, generator=generator)
        drawn = {
            "keep": keep,
            "forget": forget,
            "noise": noise,
            "timesteps": torch.randint(len(path), (batch,), generator=generator),
            "from_forget": torch.randperm(batch, generator=generator) < batch // 2,
            "keep_condition": torch.arange(batch),
            "forget_condition": torch.arange(batch),
        }
        query = Query(**drawn, path=path)
        parts = [slice(start, start + micro_batch) for start in range(0, batch, micro_batch)]
        windows.append([replace(query, **{name: value[part] for name, value in drawn.items()}) for part in parts])
    return windows


class Trainer:
    """A network and its optimizer, with the steps of the variants that train it.

    Args:
        args: of the command line, and `device`.
        batch: pairs per step, each with a prompt of its own in the cache of embeddings.
        lora: whether an adapter is trained, of the attention projections, rank 4.
    """

    def __init__(self, args: argparse.Namespace, model: Model, batch: int, lora: bool) -> None:
        self.device, self.channels_last, self.latents = args.device, args.channels_last, model.latents
        self.on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        config = model.config
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype if lora else torch.float32)  # 12 billion float32 weights would fill the card
        try:
            with self.device:  # random numbers are drawn where they are needed
                self.network = model.network(**config)
        finally:
            torch.set_default_dtype(before)
        if lora:
            add_lora(self.network, AdapterSettings(4, 4, 0.0, StableDiffusion.lora_targets), dtype)
        self.network.to(self.device)
        if args.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.path = make_path().to(self.device)
        self.posterior, self.gradients = None, {}
        self.told = self.embeddings(model.network, config, batch, dtype)

    def embeddings(self, network: type, config: dict, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the cache of embeddings: a prompt for each pair of a step."""
        if network is FluxTransformer2DModel:
            defaults = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | config
            shapes = {
                "encoder_hidden_states": (FLUX_PROMPT_LENGTH, defaults["joint_attention_dim"]),
                "pooled_projections": (defaults["pooled_projection_dim"],),
            }
        else:
            shapes = {"encoder_hidden_states": (PROMPT_LENGTH, config["cross_attention_dim"])}
            if "addition_embed_type" in config:
                width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
                shapes["text_embeds"] = (width,)
        return {name: torch.randn(batch, *shape).to(self.device, dtype) for name, shape in shapes.items()}

    def engine(self, method: str) -> PairedGradients:
        """Return the engine of a method. Not before it is used: plain alone must not pay for the buffers."""
        if method not in self.gradients:
            rule = METHODS[method](lam=LAM).rule(scaling_rule("relative", 0.1))
            self.gradients[method] = PairedGradients(self.parameters, rule)
        return self.gradients[method]

    def step(self, variant: str, window: Window) -> None:
        """Go from latents on the host to new weights."""
        name = variant.removesuffix("_lora")
        if name == "plain":
            self.plain(window)
        else:
            method = name.removesuffix("_lagged")
            stats = self.engine(method).compute(
                [METHODS[method](lam=LAM).rows(self.completed(query, method)) for query in window],
                lambda rows: self.predict(rows.noisy, rows.timesteps, rows.condition),
                MAX_GRAD_NORM,
                forget_scale=LAGGED_SCALE if name == "siss_lagged" else None,
            )
            if stats.skipped:
                raise RuntimeError(f"{variant}: a gradient is not finite, and a step that is skipped says nothing")
        self.optimizer.step()
        # Ours too: what it leaves in `.grad` is a buffer that plain's backward would add to.
        self.optimizer.zero_grad(set_to_none=True)

    def completed(self, query: Query, method: str) -> Query:
        """Return a query with what the method needs."""
        if "posterior_mean" not in METHODS[method].needs:
            return query
        if self.posterior is None:  # in the first step, which is not timed
            channels, side = self.latents
            images = torch.randn(
                DEFAULT_REDIRECT_IMAGES, channels, side, side, generator=torch.Generator().manual_seed(1)
            )
            self.posterior = keep_posterior(images.to(self.device))
        return with_posterior_means(query, self.posterior)

    def plain(self, window: Window) -> None:
        """Compute the gradient of ordinary fine-tuning."""
        for query in window:
            clean, noise, timesteps = (
                value.to(self.device, non_blocking=True) for value in (query.keep, query.noise, query.timesteps)
            )
            noisy = self.path.add_noise(clean, noise, timesteps)
            prediction = self.predict(noisy, timesteps, query.keep_condition)
            (F.mse_loss(prediction, noise) / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return the output of the network in float32, under autocast as accelerate does it."""
        told = {name: table[condition.to(self.device, non_blocking=True)] for name, table in self.told.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            if isinstance(self.network, FluxTransformer2DModel):
                return self.flux(noisy, timesteps, told).float()
            if self.channels_last:
                noisy = noisy.contiguous(memory_format=torch.channels_last)
            states, added = told.pop("encoder_hidden_states"), None
            if told:
                side = 8.0 * self.latents[1]  # original size, corner of the crop, target size
                time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
                added = told | {"time_ids": time_ids.expand(len(noisy), -1)}
            return self.network(noisy, timesteps, states, added_cond_kwargs=added).sample.float()

    def flux(self, noisy: torch.Tensor, timesteps: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        """Call Flux, which takes patches of 2x2 latents as tokens."""
        batch, channels, height, width = noisy.shape
        patched = noisy.unflatten(3, (width // FLUX_PATCH, FLUX_PATCH)).unflatten(
            2, (height // FLUX_PATCH, FLUX_PATCH)
        )
        tokens = patched.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        rows, columns = height // FLUX_PATCH, width // FLUX_PATCH
        places = torch.zeros(rows, columns, 3, device=noisy.device)
        places[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(columns, device=noisy.device)
        output = self.network(
            tokens,
            timestep=timesteps / 1000,
            guidance=torch.ones(batch, device=noisy.device),
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(FLUX_PROMPT_LENGTH, 3, device=noisy.device),
            **told,
        ).sample
        patches = output.unflatten(2, (channels, FLUX_PATCH, FLUX_PATCH)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def is_lora(variant: str) -> bool:
    """Tell whether a variant trains an adapter."""
    return variant.endswith("_lora")


def make_steps(args: argparse.Namespace, model: Model, batch: int, variants: Sequence[str]) -> dict[str, Step]:
    """Return the step of each variant: one network for those in full, one for those by LoRA."""
    trainers = {lora: Trainer(args, model, batch, lora) for lora in sorted(set(map(is_lora, variants)))}
    return {variant: partial(trainers[is_lora(variant)].step, variant) for variant in variants}

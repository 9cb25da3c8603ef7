"""Seconds and peak memory of one optimizer step of Stable Diffusion, side by side: `python benchmarks/step_cost.py --sd`.

plain: text-to-image fine-tuning as the official script does it, the VAE and the text encoder in the loop. plain_cached,
plain_lora: the same from cached latents and embeddings, in full and by LoRA. two_backward: the published SISS step,
encoders in the loop, written from its equations. siss, redirect and the same by LoRA: ours, from cached latents; redirect with
1,000 of them on the device. Weights are random.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, importance_weights, scaling_rule
from siss_diffusers.families import StableDiffusion
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.settings.shared import DEFAULT_REDIRECT_IMAGES
from siss_diffusers.training.adapters import add_lora
from siss_diffusers.training.redirection import KeepPosterior


VARIANTS = ("plain_cached", "plain", "redirect", "siss", "two_backward", "plain_lora", "redirect_lora", "siss_lora")
PROMPT_LENGTH = 77
SCALING_NORM = 750.0  # of the published experiment; its value does not change the cost
LAM = 0.5
MAX_GRAD_NORM = 1.0


def build_models(full_size: bool) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, VAE and text encoder: Stable Diffusion 1.5's architecture, or a narrow one."""
    text_width, text_layers = (768, 12) if full_size else (128, 4)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 64,
            projection_dim=text_width,
        )
    )
    vae = AutoencoderKL(
        sample_size=512 if full_size else 256,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512) if full_size else (32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if full_size else 1,
    )
    if full_size:
        # The defaults of the class are Stable Diffusion 1's blocks.
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return unet, vae, text_encoder
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=8,
    )
    return unet, vae, text_encoder


def draw_batches(size: int, batch: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The same for every variant; exactly half of the pairs take the forget component."""
    generator = torch.Generator().manual_seed(0)
    latent_size = size // 8
    batches = []
    for _ in range(count):
        pictures = torch.randn(2, batch, 3, size, size, generator=generator).clamp(-1, 1)
        batches.append(
            {
                "pictures": pictures,
                # What the cache holds; random, for a random VAE makes nothing better.
                "latents": torch.randn(2, batch, 4, latent_size, latent_size, generator=generator),
                "noise": torch.randn(batch, 4, latent_size, latent_size, generator=generator),
                "timesteps": torch.randint(1000, (batch,), generator=generator),
                "from_forget": torch.randperm(batch, generator=generator) < batch // 2,
                "token_ids": torch.randint(49_000, (batch, PROMPT_LENGTH), generator=generator),
            }
        )
    return batches


def keep_posterior(images: torch.Tensor) -> KeepPosterior:
    """All of the images stand in for any condition."""
    return KeepPosterior(images, {}, torch.arange(len(images), device=images.device))


def with_posterior_means(query: Query, posterior: KeepPosterior) -> Query:
    """What `redirect` needs. The thresholds are those of a loss of 0.1, their value does not change the cost."""
    thresholds = torch.full(query.timesteps.shape, 0.1)
    return replace(query, posterior_mean=posterior.means(query), thresholds=thresholds, keep_thresholds=thresholds)


class Step:
    """One optimizer step of a variant, from pictures or latents on the host to new weights."""

    def __init__(self, variant: str, full_size: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.variant, self.device = variant, device
        self.unet, vae, text_encoder = build_models(full_size)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if variant.endswith("_lora"):
            add_lora(self.unet, AdapterSettings(4, 4, 0.0, StableDiffusion.lora_targets), self.dtype)
        self.unet.to(device)
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.path = GaussianPath.from_scheduler(self.scheduler)
        self.hidden_states = torch.randn(
            PROMPT_LENGTH, text_encoder.config.hidden_size, device=device, dtype=self.dtype
        )
        if variant in ("plain", "two_backward"):
            self.vae = vae.requires_grad_(False).to(device, self.dtype)
            self.text_encoder = text_encoder.requires_grad_(False).to(device, self.dtype)
        self.keep_posterior, name = None, variant.removesuffix("_lora")
        self.is_ours = name in METHODS
        if self.is_ours:
            self.method = METHODS[name](lam=LAM)
            self.gradients = PairedGradients(self.parameters, self.method.rule(scaling_rule("relative", 0.1)))

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda"):
            if self.is_ours:
                self.ours(batch)
            elif self.variant == "two_backward":
                self.two_backward({name: value.to(self.device, non_blocking=True) for name, value in batch.items()})
            else:
                self.plain({name: value.to(self.device, non_blocking=True) for name, value in batch.items()})
        self.optimizer.step()
        if not self.is_ours:
            self.optimizer.zero_grad(set_to_none=True)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, hidden_states).sample.float()

    def ours(self, batch: dict[str, torch.Tensor]) -> None:
        keep, forget = batch["latents"]
        query = Query(
            keep=keep,
            forget=forget,
            noise=batch["noise"],
            timesteps=batch["timesteps"],
            from_forget=batch["from_forget"],
            path=self.path,
        )
        if self.method.name == "redirect":
            if self.keep_posterior is None:  # in the first step, which is not timed
                images = torch.randn(
                    DEFAULT_REDIRECT_IMAGES, *keep.shape[1:], generator=torch.Generator().manual_seed(1)
                )
                self.keep_posterior = keep_posterior(images.to(self.device))
            query = with_posterior_means(query, self.keep_posterior)
        self.gradients.compute(
            [self.method.rows(query)],
            lambda rows: self.predict(rows.noisy, rows.timesteps, self.hidden_states.expand(len(rows), -1, -1)),
            MAX_GRAD_NORM,
        )

    def plain(self, batch: dict[str, torch.Tensor]) -> None:
        if self.variant == "plain":
            clean = self.encode(batch["pictures"][0])
            hidden_states = self.text_encoder(batch["token_ids"])[0]
        else:
            clean, hidden_states = batch["latents"][0], self.hidden_states.expand(len(batch["noise"]), -1, -1)
        noisy = self.scheduler.add_noise(clean, batch["noise"], batch["timesteps"])
        F.mse_loss(self.predict(noisy, batch["timesteps"], hidden_states), batch["noise"]).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.vae.encode(pictures.to(self.dtype)).latent_dist.sample().float() * 0.18215

    def two_backward(self, batch: dict[str, torch.Tensor]) -> None:
        keep, forget = (self.encode(pictures) for pictures in batch["pictures"])
        hidden_states = self.text_encoder(batch["token_ids"])[0]
        timesteps = batch["timesteps"]
        alphas, sigmas = (
            value.to(self.device)[timesteps][:, None, None, None] for value in (self.path.alphas, self.path.sigmas)
        )
        source = torch.where(batch["from_forget"][:, None, None, None], forget, keep)
        noisy = alphas * source + sigmas * batch["noise"]
        noise_keep, noise_forget = (noisy - alphas * keep) / sigmas, (noisy - alphas * forget) / sigmas
        log_ratio = (noise_keep.square() - noise_forget.square()).flatten(1).sum(1) / 2
        weights = importance_weights(log_ratio, LAM)

        output = self.predict(noisy, timesteps, hidden_states)
        loss_keep, loss_forget = (
            (weight * (output - target).square().flatten(1).sum(1)).mean()
            for weight, target in zip(weights, (noise_keep, noise_forget))
        )
        loss_keep.backward(retain_graph=True)
        gradient_keep = [parameter.grad.clone() for parameter in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        loss_forget.backward()
        coefficient = SCALING_NORM / torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        for parameter, gradient in zip(self.parameters, gradient_keep):
            parameter.grad = gradient - coefficient * parameter.grad
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)

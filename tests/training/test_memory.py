"""What the real architectures take on a card, by their shapes: configurations, no weights."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from siss_diffusers.families import StableDiffusion
from siss_diffusers.families.sources import take_pictures_one_by_one
from siss_diffusers.metrics.likelihood import MAX_NUMBERS
from siss_diffusers.settings import AdapterSettings, TextToImageSettings
from siss_diffusers.training.adapters import add_lora
from tests.helpers.memory import GIB, PeakMemory


def stable_diffusion_vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )


@pytest.mark.parametrize("sliced, low, high", [(False, 20, 26), (True, 0.5, 4)])
def test_a_batch_of_samples_is_decoded_and_encoded_in_a_few_gigabytes(sliced, low, high, monkeypatch):
    """32 of 512 pixels, the batch of `siss evaluate`. All at once they would not fit a card of 24 GB."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no `meta`
    vae = stable_diffusion_vae()
    pipeline = SimpleNamespace(vae=vae, components={"vae": vae})
    if sliced:
        take_pictures_one_by_one(pipeline)
    family = StableDiffusion(3, 512)
    with PeakMemory(vae) as memory:
        family.decode(pipeline, torch.empty(32, 4, 64, 64, device="meta"))
        family.encode(pipeline, torch.empty(32, 3, 512, 512, device="meta"))
    assert low < memory.peak / GIB < high


class FlashAttention(torch.autograd.Function):
    """Attention as GPUs have it, by its shapes: the matrix of all pairs of tokens is never there."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.mark.parametrize("share, low, high", [(1.0, 14, 20), (0.5, 7, 12)], ids=["redirect", "siss"])
def test_an_adapter_of_stable_diffusion_is_trained_on_a_card_of_24_gigabytes_at_the_defaults(
    share, low, high, monkeypatch
):
    """The frozen weights in half precision. `redirect` calls the network for all rows of a micro-batch at once, `siss` for those
    of either side, about half of them."""
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: FlashAttention.apply(query, key, value),
    )
    settings = TextToImageSettings(use_lora=True)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    finally:
        torch.set_default_dtype(dtype)
    add_lora(network, AdapterSettings(settings.rank, 4.0, 0.0, StableDiffusion.lora_targets), torch.bfloat16)
    rows = int(share * settings.train_batch_size)
    with PeakMemory(network) as memory:
        noisy = torch.empty(rows, 4, 64, 64, device="meta", dtype=torch.bfloat16)
        told = torch.empty(rows, 77, 768, device="meta", dtype=torch.bfloat16)
        network(noisy, torch.zeros(rows, device="meta"), told).sample.float().square().mean().backward()
    assert low < memory.peak / GIB < high


@pytest.mark.parametrize("rows, low, high", [(32, 50, 90), (None, 4, 20)])
def test_the_likelihood_of_256_pixels_takes_less_than_20_gigabytes(rows, low, high):
    """The network of google/ddpm-celebahq-256, forward with a graph and back to the pictures."""
    with torch.device("meta"):
        network = UNet2DModel(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
            attention_head_dim=None,
        )
    shape = (3, 256, 256)
    rows = rows or MAX_NUMBERS // torch.Size(shape).numel()
    with PeakMemory(network) as memory:
        pictures = torch.empty(rows, *shape, device="meta", requires_grad=True)
        output = network(pictures, torch.zeros(rows, device="meta")).sample
        torch.autograd.grad((output * torch.empty_like(output)).sum(), pictures)
    assert low < memory.peak / GIB < high

"""LoRA adapters: thin calls into peft and diffusers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from siss_diffusers.errors import UsageError
from siss_diffusers.storage.sharding import gathered, load_into


LORA_FILE = "pytorch_lora_weights.safetensors"
ATTENTION_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0")


def check_target_modules(unet_config: dict, target_modules: Sequence[str]) -> None:
    """Every target must be the end of the name of a linear or convolutional layer; needs no weights.

    Raises:
        UsageError: naming the one that is not.
    """
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(unet_config)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in target_modules:
        if not any(name == target or name.endswith("." + target) for name in layers):
            raise UsageError(
                f"--lora_target_modules: the UNet has no linear or convolutional layer {target!r}; the attention"
                f" projections are {' '.join(ATTENTION_PROJECTIONS)}"
            )


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    dtype: torch.dtype,
) -> None:
    """Freeze the UNet in `dtype` and add an adapter whose weights are the only trainable ones, in float32.

    Its first factors are drawn from torch's global generator, its second ones are zero: it starts as the identity.
    """
    unet.requires_grad_(False)
    if dtype != unet.dtype:
        unet.to(dtype=dtype)
    unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            target_modules=list(target_modules),
        )
    )
    cast_training_params(unet, dtype=torch.float32)


def save_lora(unet: UNet2DConditionModel, folder: Path | None) -> None:
    """Write `pytorch_lora_weights.safetensors`, with the rank and alpha in its metadata, so that it loads at the scale
    that it was trained at.

    Args:
        folder: None on the ranks that only hand over their shards; all ranks must call where the UNet is sharded.
    """
    # In peft's own names, as the newer official scripts save them: of an adapter on attention and convolutions, a
    # file in the older names of the official Stable Diffusion script loads one kind only, without a word.
    layers = gathered(get_peft_model_state_dict(unet).items())
    if folder is not None:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            safe_serialization=True,
        )


def load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Read the file of `save_lora` back into the adapter of `add_lora`.

    Raises:
        ValueError: where the file belongs to an adapter of another shape.
    """
    state, _ = StableDiffusionPipeline.lora_state_dict(folder, weight_name=LORA_FILE, use_safetensors=True)
    saved = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    adapter = get_peft_model_state_dict(unet)
    if {name: value.shape for name, value in saved.items()} != {name: t.shape for name, t in adapter.items()}:
        raise ValueError(f"{folder / LORA_FILE} does not fit the adapter; were --rank or its modules changed?")
    for name, target in adapter.items():
        load_into(target, saved[name])

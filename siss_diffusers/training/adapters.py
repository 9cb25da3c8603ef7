"""LoRA adapters: thin calls into peft and diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from siss_diffusers.errors import UsageError
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.storage.files import LORA_FILE
from siss_diffusers.storage.sharding import gathered, load_into
from siss_diffusers.storage.tensors import open_tensors


def layers_of(network: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Return the names of the linear and convolutional layers, which can have an adapter.

    Args:
        targets: only layers whose names end in one of these.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if targets is None:
        return layers
    return [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]


def choose_target_modules(network: nn.Module, target_modules: Sequence[str], default: Sequence[str]) -> list[str]:
    """Return the layers that get an adapter: those that are named, or every one of the network for `all`.

    Args:
        network: its weights are not read.
        default: the targets to name in a message.

    Raises:
        UsageError: for a layer that the network does not have, or others beside `all`.
    """
    if "all" not in target_modules:
        check_target_modules(network, target_modules, default)
        return list(target_modules)
    if len(target_modules) > 1:
        raise UsageError("--lora_target_modules: `all` stands alone; drop the other names, or name layers only")
    return layers_of(network)


def check_target_modules(network: nn.Module, target_modules: Sequence[str], default: Sequence[str]) -> None:
    """Refuse a target that is not the end of the name of a linear or convolutional layer.

    Args:
        network: its weights are not read.
        default: the targets to name in the message.

    Raises:
        UsageError: naming the target.
    """
    for target in target_modules:
        if not layers_of(network, [target]):
            raise UsageError(
                f"--lora_target_modules: the network has no linear or convolutional layer {target!r}; the attention"
                f" projections are {' '.join(default)}"
            )


def add_lora(network: nn.Module, adapter: AdapterSettings, dtype: torch.dtype) -> None:
    """Freeze a network in `dtype` and add an adapter whose weights are the only trainable ones, in float32.

    Its first factors are drawn from torch's global generator, its second ones are zero: it starts as the identity.
    """
    targets = list(adapter.target_modules)
    if any(
        isinstance(module, nn.ModuleList) and f".{name}".endswith(tuple(f".{target}" for target in targets))
        for name, module in network.named_modules()
    ):
        targets = layers_of(network, targets)  # peft would try to adapt the list itself
    network.requires_grad_(False)
    if dtype != network.dtype:
        network.to(dtype=dtype)
    network.add_adapter(
        LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
    )
    cast_training_params(network, dtype=torch.float32)


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[None]:
    """Inside, the network answers as if it had no adapter.

    The scale is 0. Disabling the layers would freeze their weights meanwhile, and FSDP 2 does not notice when they are
    trained again.
    """
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]

    def set_scale(scale: float) -> None:
        for layer in layers:
            for name in layer.active_adapters:
                layer.set_scale(name, scale)

    set_scale(0.0)
    try:
        yield
    finally:
        set_scale(1.0)


def save_lora(network: nn.Module, folder: Path | None, pipeline_class: Any, network_name: str) -> None:
    """Write `pytorch_lora_weights.safetensors`, with the rank and alpha in its metadata, so that it loads at the scale
    that it was trained at.

    Args:
        folder: None on the ranks that only hand over their shards; all ranks must call where the network is sharded.
        pipeline_class: of the pipelines that will load the file.
        network_name: the component that has the adapter.
    """
    # In peft's own names, as the newer official scripts save them: of an adapter on attention and convolutions, a
    # file in the older names of the official Stable Diffusion script loads one kind only, without a word.
    layers = gathered(get_peft_model_state_dict(network).items())
    if folder is not None:
        pipeline_class.save_lora_weights(
            folder,
            safe_serialization=True,
            **{
                f"{network_name}_lora_layers": layers,
                f"{network_name}_lora_adapter_metadata": network.peft_config["default"].to_dict(),
            },
        )


def load_lora(network: nn.Module, folder: Path, network_name: str) -> None:
    """Read the file of `save_lora` back into the adapter of `add_lora`.

    Raises:
        ValueError: where the file belongs to an adapter of another shape.
    """
    prefix = f"{network_name}."
    tensors = open_tensors(folder, Path(LORA_FILE).stem)
    saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    adapter = get_peft_model_state_dict(network)
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != {name: tuple(value.shape) for name, value in adapter.items()}:
        raise ValueError(f"{folder / LORA_FILE} does not fit the adapter; were --rank or its modules changed?")
    for name, target in adapter.items():
        load_into(target, saved[name])

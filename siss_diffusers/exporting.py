"""Adapters in the formats of other programs, at the scale at which they were trained."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import loading
from siss_diffusers.storage.files import LORA_FILE, write_json


METADATA_KEY = "lora_adapter_metadata"  # as diffusers writes it
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """An adapter on one network.

    Args:
        network_name: the component of the pipeline that it is for.
        layers: the two factors of each layer by its name, `(rank, in, ...)` and `(out, rank, ...)`.
        config: peft's settings of it; `lora_alpha` over `r` is the scale that the product is added at.
    """

    network_name: str
    layers: dict[str, tuple[Tensor, Tensor]]
    config: dict

    @classmethod
    def read(cls, run: Path) -> "Adapter":
        """Read the adapter of a run.

        Raises:
            UsageError: for a file that cannot be read, or was not written by a run of this package.
        """
        with loading(run, "RUN"), safe_open(run / LORA_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        network_name = next(iter(tensors)).partition(".")[0]
        prefix = f"{network_name}."
        config = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        layers = {
            name.removesuffix(DOWN): (tensors[name], tensors.get(name.removesuffix(DOWN) + UP))
            for name in tensors
            if name.startswith(prefix) and name.endswith(DOWN)
        }
        if (
            "lora_alpha" not in config
            or 2 * len(layers) != len(tensors)
            or any(up is None for _, up in layers.values())
        ):
            raise UsageError(f"{run / LORA_FILE} was not written by a run of this package, and its scale is not known")
        return cls(network_name, {name.removeprefix(prefix): factors for name, factors in layers.items()}, config)

    @property
    def alpha(self) -> Tensor:
        """What other programs divide by the rank to get the scale."""
        return torch.tensor(float(self.config["lora_alpha"]))


def write_kohya(adapter: Adapter, folder: Path, name: str) -> Path:
    """Write a file as sd-scripts does, which A1111, Forge and ComfyUI load for UNets.

    Raises:
        UsageError: for a transformer, in which that format joins layers that are apart in diffusers.
    """
    if adapter.network_name != "unet":
        raise UsageError(
            "--format kohya: its files of transformers have layers in one that are several here; use --format comfyui"
        )
    tensors = {}
    for layer, (down, up) in adapter.layers.items():
        key = "lora_unet_" + layer.replace(".", "_")
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": adapter.alpha.clone(),
        }
    return save(tensors, folder / f"{name}.safetensors")


def write_comfyui(adapter: Adapter, folder: Path, name: str) -> Path:
    """Write a file with the names that ComfyUI knows: those of kohya for UNets, of diffusers for transformers.

    Without `alpha` it would add the product as it is.
    """
    if adapter.network_name == "unet":
        return write_kohya(adapter, folder, name)
    tensors = {}
    for layer, (down, up) in adapter.layers.items():
        key = f"{adapter.network_name}.{layer}"
        tensors |= {key + DOWN: down, key + UP: up, f"{key}.alpha": adapter.alpha.clone()}
    return save(tensors, folder / f"{name}.safetensors")


def write_peft(adapter: Adapter, folder: Path, name: str) -> Path:
    """Write a folder for `PeftModel.from_pretrained(network, folder)`."""
    write_json(folder / "adapter_config.json", adapter.config | {"inference_mode": True})
    prefix = "base_model.model."
    tensors = {prefix + layer + DOWN: down for layer, (down, _) in adapter.layers.items()}
    tensors |= {prefix + layer + UP: up for layer, (_, up) in adapter.layers.items()}
    return save(tensors, folder / "adapter_model.safetensors")


def save(tensors: dict[str, Tensor], file: Path) -> Path:
    """Write a safetensors file; return its path."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def write(adapter: Adapter, format: str, folder: Path, name: str) -> Path:
    """Write an adapter as `kohya`, `comfyui` or `peft` into a folder that is there; return the file of its weights.

    Args:
        name: of the file, where the format leaves it open.

    Raises:
        UsageError: for a network that the format does not know.
    """
    return {"kohya": write_kohya, "comfyui": write_comfyui, "peft": write_peft}[format](adapter, folder, name)

"""An adapter made part of the weights: a pipeline from which nobody can take the adapter out."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from siss_diffusers.errors import UsageError
from siss_diffusers.families import Family, NamedPipeline
from siss_diffusers.families.trust import loading
from siss_diffusers.storage.files import LORA_FILE


DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def fuse(source: NamedPipeline, family: Family, run: Path, folder: Path, scale: float = 1.0) -> None:
    """Save a pipeline with an adapter made part of its network. Every other file is copied as it is.

    The sum is computed in float32, and each weight is saved in the precision that it has in the base: what the adapter
    does not touch stays bit for bit, half precision included.

    Args:
        source: the pipeline that the adapter was trained on.
        run: holds the adapter.
        folder: where the pipeline is saved.
        scale: of the adapter; 1 is as it was trained.

    Raises:
        UsageError: for files that cannot be read, or an adapter of another network.
    """
    source.check_rest(family)
    dtypes = stored_dtypes(source.network_files(family))
    network = source.read_network(family)
    attach(network, family.network_name, run, source)
    network.fuse_lora(lora_scale=scale, safe_fusing=True)
    network.unload_lora()
    cast_to_stored(network, dtypes)
    network.save_pretrained(folder / family.network_name)
    source.save_rest(family, None, folder)


def attach(network: nn.Module, network_name: str, run: Path, source: NamedPipeline) -> None:
    """Load the adapter of a run into a network, all of it.

    Raises:
        UsageError: where a layer of the file is not in the network, or has another shape.
    """
    with loading(run, "RUN"), safe_open(run / LORA_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    # Of a file that does not fit, diffusers would print every layer.
    if not fits(network, {name.removeprefix(f"{network_name}."): shape for name, shape in shapes.items()}):
        raise UsageError(
            f"--base: the adapter in {run} does not fit the {network_name} of {source.describe()}; name the base of its"
            " training"
        )
    with loading(run, "RUN"):
        network.load_lora_adapter(run, weight_name=LORA_FILE, prefix=network_name, use_safetensors=True)


def fits(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Tell whether each layer of an adapter, in the names of peft, is one of the network.

    Args:
        shapes: of the tensors of the adapter, by their names.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    down = {name.removesuffix(DOWN): shape for name, shape in shapes.items() if name.endswith(DOWN)}
    up = {name.removesuffix(UP): shape for name, shape in shapes.items() if name.endswith(UP)}
    if down.keys() != up.keys() or len(down) + len(up) != len(shapes) or not down.keys() <= layers.keys():
        return False
    weights = {name: layers[name].weight.shape for name in down}
    return all(
        down[name][1:] == tuple(weights[name][1:]) and up[name][:2] == (weights[name][0], down[name][0])
        for name in down
    )


def stored_dtypes(files: list[Path]) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in safetensors files."""
    dtypes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            # An empty slice has the dtype, and reads nothing.
            dtypes |= {
                name: file.get_slice(name)[:0].dtype for name in file.keys() if file.get_slice(name).get_shape()
            }
    return dtypes


def cast_to_stored(network: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each parameter and buffer the dtype that it is stored in; others stay."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))

"""Models and optimizer states sharded by FSDP 2: each rank reads its own rows, and no rank ever holds the whole."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from siss_diffusers.gradients.buffers import local
from siss_diffusers.storage.tensors import SavedTensor, open_tensors, write_tensors


# The name that diffusers gives to the weights of a model.
WEIGHTS = "diffusion_pytorch_model"


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """After a forward without a backward FSDP2 keeps some weights whole, and the next forward would use them as they
    are, whatever has become of the shards since."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def rows_of(parameter: DTensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Tell on all processes alike whether tensors, of which each may hold a shard only, are finite.

    By norms, which overflow before the numbers do: weights that are too large to be squared are of no use either.
    """
    norms = [torch.linalg.vector_norm(local(tensor).float()).cpu() for tensor in tensors]
    answer = torch.stack(norms).isfinite().all().float()
    if dist.is_available() and dist.is_initialized():
        answer = answer.to(tensors[0].device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def load_into(target: Tensor, saved: SavedTensor | Tensor) -> None:
    """Copy a saved tensor over one of its shape, of which this rank may hold a shard only."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(saved[rows_of(target)])
        else:
            target.copy_(saved[...])


def like(parameter: nn.Parameter, saved: Any) -> Any:
    """What was saved for a parameter, with every tensor of its shape, such as a moment of its gradients, laid out as the
    parameter is. Optimizers keep numbers and dictionaries, too."""
    if isinstance(saved, dict):
        return {name: like(parameter, value) for name, value in saved.items()}
    if not isinstance(saved, SavedTensor):
        return saved
    if isinstance(parameter, DTensor) and tuple(saved.shape) == tuple(parameter.shape):
        found = torch.empty_like(parameter, requires_grad=False)
        load_into(found, saved)
        return found
    return saved[...]


def load_model(model: ModelMixin, folder: Path) -> None:
    """Read the weights of `save_model`, or of diffusers' `save_pretrained`, into a model that may be sharded.

    Raises:
        KeyError: where the files lack a weight.
    """
    saved = open_tensors(folder, WEIGHTS)
    for name, target in model.state_dict().items():
        load_into(target, saved[name])


def skeleton(model: ModelMixin) -> ModelMixin:
    """The model without weights, of the class that it had before it was sharded."""
    model_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with init_empty_weights():
        return model_class.from_config(model.config)


def save_model(model: ModelMixin, folder: Path | None) -> None:
    """As diffusers' `save_pretrained`, which `from_pretrained` reads; a sharded model without it ever being whole.

    Args:
        folder: None on the ranks that only hand over their shards; all ranks must call where the model is sharded.
    """
    if is_sharded(model):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            skeleton(model).save_config(folder)
        write_tensors(folder, WEIGHTS, model.state_dict())
    elif folder is not None:
        model.save_pretrained(folder)


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Small tensors, such as those of an adapter, whole on every rank."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors}

"""Nested states as safetensors and JSON; no pickles."""

from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from siss_diffusers.storage.files import read_json, write_json


# More tensors than that go to several files, the most that a process gathers of a sharded model at a time.
MAX_FILE_BYTES = 2**30


def split_tensors(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take a nested state apart into something that JSON can hold and a flat dictionary of tensors.

    Dictionaries with integer keys (as in optimizer states) are marked, since JSON knows only string keys.
    """
    if isinstance(state, Tensor):
        return {"__tensor__": path}, {path: state}
    if isinstance(state, dict):
        plain, tensors = {}, {}
        for key, value in state.items():
            name = f"int:{key}" if isinstance(key, int) else key
            plain[name], found = split_tensors(value, f"{path}/{key}")
            tensors |= found
        return plain, tensors
    if isinstance(state, list | tuple):
        parts = [split_tensors(value, f"{path}/{index}") for index, value in enumerate(state)]
        return [plain for plain, _ in parts], {key: value for _, found in parts for key, value in found.items()}
    return state, {}


def join_tensors(plain: Any, tensors: dict[str, Any]) -> Any:
    """Undo `split_tensors` (tuples come back as lists)."""
    if isinstance(plain, dict):
        if "__tensor__" in plain:
            return tensors[plain["__tensor__"]]
        return {
            int(key[4:]) if key.startswith("int:") else key: join_tensors(value, tensors)
            for key, value in plain.items()
        }
    if isinstance(plain, list):
        return [join_tensors(value, tensors) for value in plain]
    return plain


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def write_tensors(folder: Path | None, stem: str, tensors: dict[str, Tensor]) -> None:
    """Write `stem.safetensors`, or several files and an index of them, as diffusers and transformers name them.

    Args:
        folder: None on the ranks that only hand over their shards; where a tensor is sharded, all ranks must call.
    """
    files: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and files[-1]:
            files.append([])
            room = MAX_FILE_BYTES
        files[-1].append(name)
        room -= size

    weight_map = {}
    for number, names in enumerate(files, start=1):
        part = {}
        for name in names:
            tensor = tensors[name].detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if folder is not None:
                # Cloned: tensors that share memory, as the quantization maps of 8-bit Adam do, cannot be saved.
                part[name] = tensor.cpu().contiguous().clone()
        if folder is not None:
            file = f"{stem}-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else f"{stem}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    if folder is not None and len(files) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_json(folder / index_name(stem), {"metadata": {"total_size": total}, "weight_map": weight_map})


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a safetensors file, read where it is indexed: `saved[...]` the whole, `saved[2:4]` some rows."""

    file: Path
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        with safe_open(self.file, framework="pt") as opened:
            return tuple(opened.get_slice(self.name).get_shape())

    def __getitem__(self, index: slice | tuple[slice, ...] | EllipsisType) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            # A scalar has no slices.
            return opened.get_tensor(self.name) if index in (..., ()) else opened.get_slice(self.name)[index]


def open_tensors(folder: Path, stem: str) -> dict[str, SavedTensor]:
    """Return what `write_tensors` wrote, by name, not yet read."""
    index = folder / index_name(stem)
    if index.is_file():
        return {name: SavedTensor(folder / file, name) for name, file in read_json(index)["weight_map"].items()}
    file = folder / f"{stem}.safetensors"
    with safe_open(file, framework="pt") as opened:
        return {name: SavedTensor(file, name) for name in opened.keys()}


def save_state(folder: Path | None, state: dict[str, Any]) -> None:
    """Save a state; `folder` as in `write_tensors`."""
    plain, tensors = split_tensors(state)
    write_tensors(folder, "state", tensors)
    if folder is not None:
        write_json(folder / "state.json", plain)


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `save_state` was given, with a `SavedTensor` for every tensor."""
    return join_tensors(read_json(folder / "state.json"), open_tensors(folder, "state"))

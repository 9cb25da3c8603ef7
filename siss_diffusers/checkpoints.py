"""Training state as safetensors and JSON: a checkpoint is whole, under its final name, or it is not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from siss_diffusers.errors import UsageError


PREFIX = "checkpoint-"


def split_tensors(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take a nested state apart into something that JSON can hold and a flat dictionary of tensors.

    Dictionaries with integer keys (as in optimizer states) are marked, since JSON knows only string keys.
    """
    if isinstance(state, Tensor):
        return {"__tensor__": path}, {path: state.detach().contiguous().cpu()}
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


def join_tensors(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split_tensors` (tuples come back as lists)."""
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


def save_state(folder: Path, state: dict[str, Any]) -> None:
    plain, tensors = split_tensors(state)
    save_file(tensors, folder / "state.safetensors")
    write_json(folder / "state.json", plain)


def load_state(folder: Path) -> dict[str, Any]:
    with open(folder / "state.json") as file:
        return join_tensors(json.load(file), load_file(folder / "state.safetensors"))


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(content) + "\n")


def truncate_json_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= last_step]
        path.write_text("".join(line + "\n" for line in lines))


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], total_limit: int | None) -> Path:
    """Let `write` fill a folder under a temporary name, sync it, rename it; then remove the oldest over the limit."""
    final = output_dir / f"{PREFIX}{step}"
    temporary = output_dir / f"tmp-{PREFIX}{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(output_dir: Path, requested: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for `latest` where there is none yet.

    Raises:
        UsageError: for a path that is not a checkpoint.
    """
    if requested == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    for path in (Path(requested), output_dir / requested):
        if (path / "state.json").is_file():
            return path
    known = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(
        f"--resume_from_checkpoint: {requested} is not a checkpoint; --output_dir holds: {known} (or use 'latest')"
    )

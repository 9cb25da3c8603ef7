"""Training state as safetensors and JSON: a checkpoint is whole, under its final name, or it is not there."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from siss_diffusers.errors import RunError, UsageError


logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
# What is not whole yet, or no longer: such folders are removed wherever they are met.
UNFINISHED = "tmp-"
SUPERSEDED = "superseded-"
# Size and checksum of every other file of a checkpoint; written last.
MANIFEST = "checkpoint.json"
CHUNK = 2**22
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
    """What `write_tensors` wrote, by name, not yet read."""
    index = folder / index_name(stem)
    if index.is_file():
        return {name: SavedTensor(folder / file, name) for name, file in read_json(index)["weight_map"].items()}
    file = folder / f"{stem}.safetensors"
    with safe_open(file, framework="pt") as opened:
        return {name: SavedTensor(file, name) for name in opened.keys()}


def save_state(folder: Path | None, state: dict[str, Any]) -> None:
    """`folder` as in `write_tensors`."""
    plain, tensors = split_tensors(state)
    write_tensors(folder, "state", tensors)
    if folder is not None:
        write_json(folder / "state.json", plain)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` was given, with a `SavedTensor` for every tensor."""
    return join_tensors(read_json(folder / "state.json"), open_tensors(folder, "state"))


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: Path, content: Any, mode: int = 0o666) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file.

    Args:
        mode: permissions of the file, from its first byte on; less the process's umask.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(content) + "\n")


def truncate_json_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps that a resumed run will do again, and the half line that a kill may have left."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
        if step <= last_step:
            lines.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines))
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file: against accidents, not against forgery."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and bring it to the disk, or leave no folder.

    Raises:
        RunError: where the disk does not take it.
    """
    remove(folder)
    try:
        folder.mkdir(parents=True)
        write(folder)
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # half of it would only fill the disk
        # safetensors reports a full disk by an exception of its own.
        if isinstance(error, OSError | SafetensorError):
            saved = [path.name for path in list_checkpoints(folder.parent)]
            rescue = (
                f"{saved[-1]} is whole: free some space and go on with --resume_from_checkpoint latest"
                if saved
                else "free some space and start again"
            )
            raise RunError(f"{folder.name.removeprefix(UNFINISHED)} could not be written ({error}); {rescue}")
        raise


def remove(folder: Path) -> None:
    """Under another name first: what is half removed must not look like a checkpoint."""
    if not folder.exists():
        return
    if not folder.name.startswith(UNFINISHED):
        doomed = folder.with_name(UNFINISHED + "removed-" + folder.name)
        shutil.rmtree(doomed, ignore_errors=True)
        folder = folder.rename(doomed)
    shutil.rmtree(folder, ignore_errors=True)


def is_saved(output_dir: Path, step: int) -> bool:
    """Whether there is a whole checkpoint of this step."""
    final = output_dir / f"{PREFIX}{step}"
    return final.exists() and damage(final) is None


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], total_limit: int | None) -> Path:
    """Let `write` fill a folder under a temporary name, bring it to the disk, rename it; only then remove the oldest
    over the limit.

    Raises:
        RunError: where the disk does not take it; earlier checkpoints are as they were.
    """
    final = output_dir / f"{PREFIX}{step}"
    temporary = output_dir / f"{UNFINISHED}{PREFIX}{step}"

    def write_with_manifest(folder: Path) -> None:
        write(folder)
        manifest = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)}
            for path in files_of(folder)
        }
        write_json(folder / MANIFEST, {"step": step, "files": manifest})

    fill(temporary, write_with_manifest)
    remove(final)
    os.replace(temporary, final)
    sync(output_dir)
    if total_limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path != final]
        for old in others[: max(len(others) - (total_limit - 1), 0)]:
            remove(old)
    return final


def save_result(output_dir: Path, write: Callable[[Path], None], last: str) -> None:
    """Let `write` fill a folder, bring it to the disk, and move what is in it into `output_dir`, `last` at the end.

    Raises:
        RunError: where the disk does not take it; what was there is as it was.
    """
    temporary = output_dir / f"{UNFINISHED}result"
    fill(temporary, write)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
        target = output_dir / path.name
        if target.is_dir():
            remove(target)
        os.replace(path, target)
    temporary.rmdir()
    sync(output_dir)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None when every byte of it is as it was written."""
    try:
        expected = read_json(checkpoint / MANIFEST)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or torn"
    for name, facts in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} of {facts['bytes']} bytes"
        if checksum(path) != facts["crc32"]:
            return f"{name} is not what was written"
    return None


def find_checkpoint(output_dir: Path, requested: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for `latest` where there is none yet. `latest` passes
    over what is not whole, and says so.

    Raises:
        UsageError: for a path that is not a checkpoint, or not a whole one.
    """
    if requested == "latest":
        for checkpoint in reversed(list_checkpoints(output_dir)):
            problem = damage(checkpoint)
            if problem is None:
                return checkpoint
            logger.warning(f"{checkpoint.name} is passed over: {problem}")
        return None
    for path in (Path(requested), output_dir / requested):
        if (path / MANIFEST).is_file() or (path / "state.json").is_file():
            problem = damage(path)
            if problem is not None:
                raise UsageError(
                    f"--resume_from_checkpoint: {path.name} is not whole ({problem}); name another, or use 'latest'"
                )
            return path
    known = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise UsageError(
        f"--resume_from_checkpoint: {requested} is not a checkpoint; --output_dir holds: {known} (or use 'latest')"
    )


def tidy(output_dir: Path, checkpoint: Path | None) -> None:
    """Before a run goes on from `checkpoint`, or starts anew (None): remove what a kill left unfinished, and set whole
    checkpoints of later steps aside, for from now on `latest` must mean one of this run."""
    for path in output_dir.glob(f"{UNFINISHED}*"):
        if path.is_dir() and path.name.removeprefix(UNFINISHED).startswith((PREFIX, "removed-", "result")):
            remove(path)
    last_step = 0 if checkpoint is None else read_json(checkpoint / MANIFEST)["step"]
    for later in list_checkpoints(output_dir):
        if int(later.name.removeprefix(PREFIX)) <= last_step:
            continue
        if damage(later) is None:
            aside = later.with_name(SUPERSEDED + later.name)
            remove(aside)
            later.rename(aside)
            logger.warning(f"{later.name} is of a later step than the run goes on from: renamed to {aside.name}")
        else:
            remove(later)

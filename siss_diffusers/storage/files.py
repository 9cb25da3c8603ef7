"""JSON and text files that are whole or not there, and bytes that have reached the disk."""

import json
import os
import zlib
from pathlib import Path
from typing import Any


# The adapter of a run, under the name that every `save_lora_weights` of diffusers uses.
LORA_FILE = "pytorch_lora_weights.safetensors"
NEAR_DUPLICATES = "near_duplicates.csv"
# What a run leaves in its folder beside the model.
RUN_FILES = (
    "unlearning.json",
    "train_log.jsonl",
    "validation_log.jsonl",
    "receipt.json",
    NEAR_DUPLICATES,
    "README.md",
)
CHUNK = 2**22


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_text(path: Path, content: str, mode: int = 0o666) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file.

    Args:
        mode: permissions of the file, from its first byte on; less the process's umask.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any, mode: int = 0o666) -> None:
    """Write `content` as JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n", mode)


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

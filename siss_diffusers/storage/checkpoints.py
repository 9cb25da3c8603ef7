"""Checkpoints: whole, under their final name, or not there."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.storage.files import checksum, files_of, read_json, sync, write_json


logger = logging.getLogger(__name__)
PREFIX = "checkpoint-"
# What is not whole yet, or no longer: such folders are removed wherever they are met.
UNFINISHED = "tmp-"
SUPERSEDED = "superseded-"
# Size and checksum of every other file of a checkpoint; written last.
MANIFEST = "checkpoint.json"


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
    """Tell whether there is a whole checkpoint of this step."""
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
    """Return what is wrong with a checkpoint; None when every byte of it is as it was written."""
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
    """Return the checkpoint that `--resume_from_checkpoint` means; None for `latest` where there is none yet. `latest`
    passes over what is not whole, and says so.

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

"""What a checkpoint says about the run that made it, and whether this run may go on from it."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from siss_diffusers.distributed import on_main_process
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import Method
from siss_diffusers.settings import Settings, flag_name
from siss_diffusers.storage.checkpoints import find_checkpoint
from siss_diffusers.storage.files import read_json


@dataclass(frozen=True)
class DataPart:
    """What identifies a part of the data in checkpoints.

    Args:
        size: items of it, used or not.
        used: `bytes` or uint8 rows of those that the run may draw, in order; another --max_train_steps gives more or
            fewer of the same.
        advice: what may have made them others than those of a checkpoint.
    """

    size: int
    used: Sequence[bytes] | np.ndarray
    advice: str = ""


def planned_positions(settings: Settings, num_processes: int, checkpoint: Path | None) -> int | None:
    """Return how many of the images to keep, in the order in which they are drawn, this run may draw, or the one that
    made the checkpoint did; None: passes over all of them."""
    if settings.max_train_steps is None:
        return None
    steps = settings.max_train_steps + settings.max_skipped_steps
    planned = steps * pairs_per_step(settings, num_processes)
    if checkpoint is not None:
        planned = max(planned, read_json(checkpoint / "state.json")["run"]["data"]["images to keep"]["hashed"])
    return planned


def pairs_per_step(settings: Settings, num_processes: int) -> int:
    """Return the pairs of an optimizer step, over all processes and micro-batches."""
    return settings.train_batch_size * num_processes * settings.gradient_accumulation_steps


def salted(salt: str, parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(salt))
    for part in parts:
        digest.update(len(part).to_bytes(8) + bytes(part))
    return digest.hexdigest()


def describe_data(data: dict[str, DataPart], salt: str, lengths: dict[str, int]) -> dict[str, dict]:
    """Return the data of `describe_run`.

    Args:
        lengths: how many items of a part to hash; default: all that are used.
    """
    described = {}
    for name, part in data.items():
        used = part.used[: lengths.get(name)]
        described[name] = {"items": part.size, "hashed": len(used), "hash": salted(salt, used)}
    return described


def describe_run(
    settings: Settings,
    method: Method,
    num_processes: int,
    checkpoint: Path | None,
    data: dict[str, DataPart],
) -> dict:
    """Describe what decides the steps of a run, for its checkpoints: numbers and names of ours as they are, everything
    else by a salted hash, so that a checkpoint tells neither files nor prompts.

    Args:
        checkpoint: whose salt to use, for comparison; None for a new one.
        data: the parts of the data by their names, "images to keep" among them.
    """
    salt = secrets.token_hex(16) if checkpoint is None else read_json(checkpoint / "state.json")["run"]["salt"]
    return {
        "salt": salt,
        "arguments": {
            flag_name(field): described(field, getattr(settings, field.name), salt)
            for field in compared_fields(settings)
        },
        "method_args": vars(method),
        "pairs_per_step": pairs_per_step(settings, num_processes),
        "data": describe_data(data, salt, lengths={}),
    }


def compared_fields(settings: Settings) -> list[Field]:
    """Return the settings that a resumed run must share."""
    endless = settings.lr_scheduler in ("constant", "constant_with_warmup")
    length_is_free = endless and settings.forget_timestep_schedule == "alternate"
    free = {"free", "length"} if length_is_free else {"free"}
    return [field for field in fields(settings) if field.metadata["resume"] not in free]


def described(field: Field, value: Any, salt: str) -> Any:
    """Return a value that may be published, and the salted hash of any other."""
    if value is None or field.metadata["public"]:
        return value
    if field.name == "pretrained_model_name_or_path" and os.path.isdir(value):
        value = str(Path(value).resolve())
    return f"hash:{salted(salt, [json.dumps(value).encode()])}"


def changes(saved: dict, current: dict) -> dict[str, str]:
    """Return the settings and the data in which two descriptions of `describe_run` differ, each with a phrase."""

    def phrase(name: str, before: object, now: object) -> str:
        if any(isinstance(value, str) and value.startswith("hash:") for value in (before, now)):
            return f"{name} is another"
        return f"{name} was {before} and is {now}"

    phrases = {}
    for prefix, part in (("--", "arguments"), ("--method_args ", "method_args")):
        for name in dict.fromkeys([*saved[part], *current[part]]):
            before, now = saved[part].get(name), current[part].get(name)
            if before != now:
                phrases[name] = phrase(prefix + name, before, now)
    if saved["pairs_per_step"] != current["pairs_per_step"]:
        before, now = saved["pairs_per_step"], current["pairs_per_step"]
        phrases["pairs_per_step"] = (
            f"a step had {before} pairs and has {now} (processes x --train_batch_size x --gradient_accumulation_steps)"
        )
    for name, now in current["data"].items():
        before = saved["data"].get(name, {"items": 0})
        if before != now:
            phrases[name] = f"the {name} are others ({before['items']} then, {now['items']} now)"
    return phrases


def find_resumed(settings: Settings, output_dir: Path) -> Path | None:
    """Return the checkpoint to go on from, chosen by the main process for all; None where there is none.

    Raises:
        UsageError: on every process, for one that is not there or not whole.
    """
    requested = settings.resume_from_checkpoint
    if requested is None:
        return None
    checkpoint = on_main_process(lambda: find_checkpoint(output_dir, requested))
    if checkpoint is None and PartialState().is_main_process:
        print("--resume_from_checkpoint latest: no checkpoint yet, starting anew")
    return checkpoint


def check_resumed(settings: Settings, checkpoint: Path, run: dict, data: dict[str, DataPart]) -> None:
    """Refuse to go on from the checkpoint of another run, without --allow_changes.

    Args:
        run: from `describe_run`, of the same data.

    Raises:
        UsageError: naming what differs.
    """
    saved = read_json(checkpoint / "state.json")["run"]
    for field in fields(settings):
        # A setting that is newer than the checkpoint had its default then.
        name = flag_name(field)
        if name in run["arguments"] and name not in saved["arguments"]:
            saved["arguments"][name] = described(field, field.default, saved["salt"])
    # The data as far as the checkpoint knows them: this run may be longer or shorter.
    lengths = {name: part["hashed"] for name, part in saved["data"].items()}
    differing = changes(saved, run | {"data": describe_data(data, saved["salt"], lengths)})
    for name in differing.keys() & data.keys():
        if data[name].advice:
            differing[name] += f" ({data[name].advice})"
    if "seed" in differing:  # then their order is another, and that is all that can be said of them
        differing = {name: phrase for name, phrase in differing.items() if name not in ("images to keep", "prompts")}
    fixed = {flag_name(field) for field in fields(settings) if field.metadata["resume"] == "fixed"}
    unreadable = [phrase for name, phrase in differing.items() if name in fixed]
    if unreadable:
        raise UsageError(
            f"--resume_from_checkpoint: {'; '.join(unreadable)}, which {checkpoint.name} cannot be read with; use the"
            " old value, or start anew in another --output_dir"
        )
    if differing and not settings.allow_changes:
        raise UsageError(
            f"--resume_from_checkpoint: {checkpoint.name} is of another run: {'; '.join(differing.values())}; use the"
            " old values, or add --allow_changes to go on with the new ones"
        )

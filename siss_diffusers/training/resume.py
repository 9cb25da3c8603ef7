"""What a checkpoint says about the run that made it, and whether this run may go on from it."""

import argparse
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from siss_diffusers.errors import UsageError
from siss_diffusers.flags import shared_settings
from siss_diffusers.methods import Method
from siss_diffusers.storage.checkpoints import find_checkpoint
from siss_diffusers.storage.files import read_json
from siss_diffusers.training.engines import on_main_process


# Arguments that a resumed run may change: they say where things are, how fast it goes and what is looked at. Those of the
# data are compared by what they led to, those of batches by their product.
FREE_ARGUMENTS = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "allow_changes",
        "cache_dir",
        "checkpointing_steps",
    ),
    *("checkpoints_total_limit", "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "report_to"),
    *("logging_dir", "tracker_project_name", "dataloader_num_workers", "gradient_checkpointing", "max_skipped_steps"),
    *("enable_xformers_memory_efficient_attention", "cache_latents", "offload_ema", "foreach_ema", "method_args"),
    *("train_batch_size", "gradient_accumulation_steps", "train_data_dir", "dataset_name", "dataset_config_name"),
    *("image_column", "caption_column", "forget_data_dir", "forget_files", "forget_column", "forget_value"),
    *("validation_steps", "validation_epochs", "validation_prompts", "num_validation_images", "guidance_scale"),
    *("num_inference_steps", "ddpm_num_inference_steps", "eval_batch_size", "stop_when_forgotten"),
    *("save_images_epochs", "save_model_epochs"),
}
# How long the run is matters to a step only under a schedule that ends, of the rate or of forgetting.
LENGTHS = {"max_train_steps", "num_train_epochs", "num_epochs"}
# What the saved state cannot be read without: not even --allow_changes helps.
FIXED_ARGUMENTS = {
    *("use_lora", "rank", "lora_target_modules", "use_ema", "use_8bit_adam", "calibrate_forgetting"),
}


@dataclass(frozen=True)
class DataPart:
    """What identifies a part of the data in checkpoints.

    Args:
        size: items of it, used or not.
        used: `bytes` or uint8 rows of those that the run may draw, in order; another --max_train_steps gives more or
            fewer of the same.
    """

    size: int
    used: Sequence[bytes] | np.ndarray


def planned_positions(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path | None) -> int | None:
    """How many of the images to keep, in the order in which they are drawn, this run may draw, or did the one that made
    the checkpoint; None: passes over all of them."""
    if args.max_train_steps is None:
        return None
    steps = args.max_train_steps + args.max_skipped_steps
    planned = steps * args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if checkpoint is not None:
        planned = max(planned, read_json(checkpoint / "state.json")["run"]["data"]["images to keep"]["hashed"])
    return planned


def salted(salt: str, parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(salt))
    for part in parts:
        digest.update(len(part).to_bytes(8) + bytes(part))
    return digest.hexdigest()


def describe_data(data: dict[str, DataPart], salt: str, lengths: dict[str, int]) -> dict[str, dict]:
    """The data of `describe_run`.

    Args:
        lengths: how many items of a part to hash; default: all that are used.
    """
    described = {}
    for name, part in data.items():
        used = part.used[: lengths.get(name)]
        described[name] = {"items": part.size, "hashed": len(used), "hash": salted(salt, used)}
    return described


def describe_run(
    args: argparse.Namespace,
    method: Method,
    accelerator: Accelerator,
    checkpoint: Path | None,
    data: dict[str, DataPart],
) -> dict:
    """What decides the steps of a run, for its checkpoints: numbers and names of ours as they are, everything else by a
    salted hash, so that a checkpoint tells neither files nor prompts.

    Args:
        checkpoint: whose salt to use, for comparison; None for a new one.
        data: the parts of the data by their names, "images to keep" among them.
    """
    salt = secrets.token_hex(16) if checkpoint is None else read_json(checkpoint / "state.json")["run"]["salt"]
    endless = args.lr_scheduler in ("constant", "constant_with_warmup")
    free = FREE_ARGUMENTS | (LENGTHS if endless and args.forget_timestep_schedule == "alternate" else set())
    shown, arguments = shared_settings(args), {}
    for name, value in vars(args).items():
        if name in free:
            continue
        if name == "pretrained_model_name_or_path" and os.path.isdir(value):
            value = str(Path(value).resolve())
        plain = value is None or name in shown
        arguments[name] = value if plain else f"hash:{salted(salt, [json.dumps(value).encode()])}"
    return {
        "salt": salt,
        "arguments": arguments,
        "method_args": vars(method),
        "pairs_per_step": args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        "data": describe_data(data, salt, lengths={}),
    }


def changes(saved: dict, current: dict) -> dict[str, str]:
    """The arguments and data in which two descriptions of `describe_run` differ, each with a phrase for people."""

    def phrase(name: str, before: object, now: object) -> str:
        if any(isinstance(value, str) and value.startswith("hash:") for value in (before, now)):
            return f"{name} is another"
        return f"{name} was {before} and is {now}"

    found = {}
    for prefix, part in (("--", "arguments"), ("--method_args ", "method_args")):
        for name in dict.fromkeys([*saved[part], *current[part]]):
            before, now = saved[part].get(name), current[part].get(name)
            if before != now:
                found[name] = phrase(prefix + name, before, now)
    if saved["pairs_per_step"] != current["pairs_per_step"]:
        before, now = saved["pairs_per_step"], current["pairs_per_step"]
        found["pairs_per_step"] = (
            f"a step had {before} pairs and has {now} (processes x --train_batch_size x --gradient_accumulation_steps)"
        )
    for name, now in current["data"].items():
        before = saved["data"].get(name, {"items": 0})
        if before != now:
            found[name] = f"the {name} are others ({before['items']} then, {now['items']} now)"
    return found


def find_resumed(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, chosen by the main process for all; None where there is none to go on from.

    Raises:
        UsageError: on every process, for one that is not there or not whole.
    """
    if args.resume_from_checkpoint is None:
        return None
    checkpoint = on_main_process(
        accelerator, lambda: find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    )
    if checkpoint is None:
        accelerator.print("--resume_from_checkpoint latest: no checkpoint yet, starting anew")
    return checkpoint


def check_resumed(args: argparse.Namespace, checkpoint: Path, run: dict, data: dict[str, DataPart]) -> None:
    """
    Args:
        run: from `describe_run`, of the same data.

    Raises:
        UsageError: where the run differs from the one that made the checkpoint, without --allow_changes.
    """
    saved = read_json(checkpoint / "state.json")["run"]
    # The data as far as the checkpoint knows them: this run may be longer or shorter.
    lengths = {name: part["hashed"] for name, part in saved["data"].items()}
    found = changes(saved, run | {"data": describe_data(data, saved["salt"], lengths)})
    if "seed" in found:  # then their order is another, and that is all that can be said of them
        found = {name: phrase for name, phrase in found.items() if name not in ("images to keep", "prompts")}
    fixed = [phrase for name, phrase in found.items() if name in FIXED_ARGUMENTS]
    if fixed:
        raise UsageError(
            f"--resume_from_checkpoint: {'; '.join(fixed)}, which {checkpoint.name} cannot be read with; use the old"
            " value, or start anew in another --output_dir"
        )
    if found and not args.allow_changes:
        raise UsageError(
            f"--resume_from_checkpoint: {checkpoint.name} is of another run: {'; '.join(found.values())}; use the old"
            " values, or add --allow_changes to go on with the new ones"
        )

"""What both scripts do around their training loop: accelerator, optimizer, the log of a step, the report of a run."""

import argparse
import hashlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import datasets
import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from tqdm.auto import tqdm

import siss_diffusers
from siss_diffusers.arguments import shared_settings
from siss_diffusers.checkpoints import (
    PREFIX,
    append_json_line,
    find_checkpoint,
    is_saved,
    read_json,
    save_checkpoint,
    save_result,
    save_state,
    truncate_json_lines,
    write_json,
)
from siss_diffusers.errors import Interrupted, RunError, UsageError
from siss_diffusers.gradients import PairedGradients, StepStats, local
from siss_diffusers.hub import again, check_repo_id, create_repository, push
from siss_diffusers.methods import Method
from siss_diffusers.sharding import is_sharded, like


logger = logging.getLogger(__name__)

T = TypeVar("T")

# A launcher sends on what the terminal has already sent to all processes: no second signal before so many seconds.
SECOND_SIGNAL_SECONDS = 1.0

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


def timestep_ranges(
    args: argparse.Namespace, num_timesteps: int
) -> tuple[tuple[int, int], list[tuple[int, int]], tuple[int, int]]:
    """--timestep_range and --forget_timestep_ranges of a model, with the defaults filled in.

    Returns:
        `(lo, hi)` of training, those of forgetting, and the `(lo, hi)` that all of the latter lie in.

    Raises:
        UsageError: for one that goes beyond the model's timesteps.
    """
    timestep_range = tuple(args.timestep_range or (0, num_timesteps))
    forget_ranges = args.forget_timestep_ranges or [timestep_range]
    for flag, ranges in (("timestep_range", [timestep_range]), ("forget_timestep_ranges", forget_ranges)):
        if max(high for _, high in ranges) > num_timesteps:
            raise UsageError(f"--{flag}: HI must not exceed the model's {num_timesteps} timesteps")
    return (
        timestep_range,
        forget_ranges,
        (min(low for low, _ in forget_ranges), max(high for _, high in forget_ranges)),
    )


def current_forget_range(
    args: argparse.Namespace, forget_ranges: list[tuple[int, int]], state: dict[str, int | float | None]
) -> tuple[int, int]:
    """--forget_timestep_schedule: the `(lo, hi)` of the next step. A skipped step takes no share of a sequence away."""
    if args.forget_timestep_schedule == "sequential":
        return forget_ranges[state["global_step"] * len(forget_ranges) // args.max_train_steps]
    return forget_ranges[state["window"] % len(forget_ranges)]


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerator and logging for the shared flags.

    Raises:
        UsageError: under an engine that the scripts do not support, or a flag that the engine does not.
    """
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        # A long time, for the other processes wait while the first one samples or reads a big data set.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=7200)),
            # A rank without rows for a side runs no forward there; a broadcast of buffers would wait for it for ever.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    # What the launcher or its configuration said, where the flag said nothing.
    args.mixed_precision = accelerator.mixed_precision
    check_engine(args, accelerator)

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (datasets.utils.logging, diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # The http client reports every request it makes.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_engine(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse what was not built, or cannot be exact, for the engine of the launcher; configure DeepSpeed.

    Raises:
        UsageError: naming what to use.
    """
    examples = "see examples/accelerate"
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if not accelerator.is_fsdp2:
            raise UsageError(f"FSDP 1 is not supported; set `fsdp_version: 2` ({examples}), or use DDP")
        refused = {
            "--mixed_precision fp16": args.mixed_precision == "fp16",
            "--use_8bit_adam": args.use_8bit_adam,
            "--offload_ema": getattr(args, "offload_ema", False),
            "`dynamo_config`": compiles,
            "`fsdp_offload_params`": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        }
        engine, instead = "FSDP 2", "drop it (for fp16: use bf16), or use DDP"
        if plugin.mixed_precision_policy is not None:
            # accelerate would sum gradients in bf16, of which one is to be subtracted from the other.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        offloads = (config["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param"))
        refused = {
            f"ZeRO-{plugin.zero_stage}": plugin.zero_stage not in (1, 2),
            "--mixed_precision fp16": args.mixed_precision == "fp16",
            "offloading": any(offload.get("device", "none") != "none" for offload in offloads),
            "`dynamo_config`": compiles,
            "--use_8bit_adam": args.use_8bit_adam,
            "--use_ema": args.use_ema,
            "--resume_from_checkpoint": args.resume_from_checkpoint is not None,
        }
        engine, instead = "DeepSpeed", f"drop it, or use ZeRO-2 in bf16, FSDP 2 or DDP ({examples})"
        # It gets the combined gradient of the whole window, clipped, and takes one step with it.
        config |= {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": 1,
            "train_batch_size": args.train_batch_size * accelerator.num_processes,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
    elif accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise UsageError(f"Megatron-LM is not supported; use FSDP 2 or DDP ({examples})")
    else:
        return
    for what, found in refused.items():
        if found:
            raise UsageError(f"{what} is not supported under {engine}; {instead}")
    if not saves_checkpoints(accelerator) and accelerator.is_main_process:
        logger.warning("DeepSpeed: no checkpoint will be written, and a run that is stopped saves nothing")


def without_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager:
    """Around the gradient engine, which reduces both gradients itself, once per step: DDP must not. FSDP 2 does it for
    the engine, in each backward, and DeepSpeed sees no backward of it."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return nullcontext()
    return accelerator.no_sync(model)


def trained_network(accelerator: Accelerator, model: nn.Module) -> Callable[..., Any]:
    """What to call for a prediction in training: under DeepSpeed the network itself, not the engine around it, whose
    hooks would take every backward for one of theirs; in the precision of its weights."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return model
    network = accelerator.unwrap_model(model)
    return lambda noisy, *others: network(noisy.to(network.dtype), *others)


def take_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, gradients: PairedGradients, stats: StepStats
) -> None:
    """Step down the combined gradient; of a skipped step there is none."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        optimizer.step()
    elif not stats.skipped:
        accelerator.backward(gradients.surrogate_loss(), scale_wrt_gas=False)  # which steps, too


def make_optimizer(args: argparse.Namespace, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, in 8 bits where asked for."""
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


@contextmanager
def averaged_weights(ema_model: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are what is saved, evaluated and shown: the moving average where there is one."""
    if ema_model is None:
        yield
        return
    trained = [local(parameter).to("cpu", copy=True) for parameter in parameters]
    for parameter, average in zip(parameters, ema_model.shadow_params):
        local(parameter).copy_(local(average))
    try:
        yield
    finally:
        for parameter, weights in zip(parameters, trained):
            local(parameter).copy_(weights)


class StopSignal:
    """From now on the first SIGINT or SIGTERM asks the run to stop after its current step, and a second one ends it at
    once.

    Attributes:
        received: the number of the signal; None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            note = f"\n{signal.Signals(number).name}: stopping after this step; once more to stop at once\n"
            os.write(2, note.encode())  # print is not safe within a handler
        elif time.monotonic() - self.received_at > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)

    def stops(self, stats: StepStats, accelerator: Accelerator) -> bool:
        """Whether to stop now; the same on all processes. Several of them learn of it with the next step's gradients."""
        return stats.stop or (accelerator.num_processes == 1 and self.received is not None)

    def end(self, accelerator: Accelerator, step: int) -> None:
        """
        Raises:
            Interrupted: always, once the main process has saved the checkpoint of this step.
        """
        accelerator.wait_for_everyone()
        if saves_checkpoints(accelerator):
            accelerator.print(f"Stopped at {PREFIX}{step}; go on with --resume_from_checkpoint latest")
        else:
            accelerator.print(
                f"Stopped at step {step}, and nothing is saved: under DeepSpeed there are no checkpoints"
            )
        accelerator.end_training()
        self.close()
        raise Interrupted(self.received or signal.SIGTERM)


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


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on all of them.

    Raises:
        UsageError: on all of them, where it does on the main process.
    """
    found: list = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = function()
        except UsageError as error:
            found[1] = str(error)
    result, problem = broadcast_object_list(found)
    if problem is not None:
        raise UsageError(problem)
    return result


def prepare_repository(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """Create the repository of --push_to_hub, for a token that does not work must not show after the training.

    Raises:
        UsageError: on every process, naming the flag.
    """
    if not args.push_to_hub:
        return None
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    check_repo_id(repo_id, "--hub_model_id")
    return on_main_process(accelerator, lambda: create_repository(repo_id, args.hub_token, args.hub_private_repo))


def finish(args: argparse.Namespace, accelerator: Accelerator, stop_signal: StopSignal, repo_id: str | None) -> None:
    """After the result is saved: publish it, unless a signal asked to stop.

    Raises:
        Interrupted: where one did.
        RunError: where the upload fails.
    """
    stop_signal.close()
    output_dir = Path(args.output_dir)
    accelerator.end_training()
    if repo_id is not None and accelerator.is_main_process:
        if stop_signal.received is not None:
            print(f"Saved and not pushed, for a signal came first: {again(output_dir, repo_id)}")
            raise Interrupted(stop_signal.received)
        logger.info(push(output_dir, repo_id, args.hub_token))


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


def initial_state() -> dict[str, int | float | None]:
    """The progress of a run, saved with its checkpoints. There is no random state, for draws are keyed by their window;
    windows count the skipped steps too, so that a skipped step is not tried again with the same draws. `forget_scale` is
    that of the last step that found its own."""
    return {
        "global_step": 0,
        "window": 0,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "one_sided_steps": 0,
        "train_seconds": 0.0,
        "forget_scale": None,
    }


def lagged_forget_scale(args: argparse.Namespace, state: dict[str, int | float | None]) -> float | None:
    """--forget_scale_every: the scale of an earlier step; None where this step has to find its own."""
    return None if state["window"] % args.forget_scale_every == 0 else state["forget_scale"]


def save_training_state(
    folder: Path | None,
    accelerator: Accelerator,
    run: dict,
    state: dict[str, int | float],
    thresholds: torch.Tensor | None,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema_model: EMAModel | None,
) -> None:
    """Everything of a checkpoint but the weights. There is no random state of any rank, for draws are keyed.

    Args:
        folder: None on the ranks that only hand over their shards.
        run: from `describe_run`.
    """
    save_state(
        folder,
        {
            "run": run,
            "progress": state,
            "thresholds": thresholds,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "ema": None if ema_model is None else ema_model.state_dict(),
        },
    )


def saves_checkpoints(accelerator: Accelerator) -> bool:
    """Not under DeepSpeed, which saves its part of the optimizer as pickles."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED


def write_checkpoints(
    accelerator: Accelerator,
    model: nn.Module,
    output_dir: Path,
    step: int,
    write: Callable[[Path | None], None],
    total_limit: int | None,
) -> None:
    """Save a checkpoint, on the main process; the others hand over their shards to `write(None)` where there are any."""
    if not saves_checkpoints(accelerator):
        return
    # A run that stops while steps are skipped may have saved this step before: there is nothing new.
    main = accelerator.is_main_process
    sharded = is_sharded(model)
    skip = main and is_saved(output_dir, step)
    if sharded:
        (skip,) = broadcast_object_list([skip])
    if skip:
        return
    if main:
        logger.info(f"Saved {save_checkpoint(output_dir, step, write, total_limit).name}")
    elif sharded:
        write(None)


def save_together(
    accelerator: Accelerator, model: nn.Module, output_dir: Path, write: Callable[[Path | None], None], last: str
) -> None:
    """Save the result, on the main process; the others hand over their shards to `write(None)` where there are any."""
    if accelerator.is_main_process:
        save_result(output_dir, write, last)
    elif is_sharded(model):
        write(None)


def restore_training_state(
    saved: dict,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema_model: EMAModel | None,
) -> None:
    """The inverse of `save_training_state`, from `load_state`, for what is not returned by it plainly.

    Hyperparameters of the optimizer and the schedule stay those of the arguments: they are the saved ones, or were
    changed on purpose.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: like(parameters[index], moments) for index, moments in saved["optimizer"]["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    lr_scheduler.load_state_dict(saved["lr_scheduler"] | {"base_lrs": lr_scheduler.base_lrs})
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    lr_scheduler._last_lr = [rate * factor for rate, factor in zip(lr_scheduler.base_lrs, factors)]
    for group, learning_rate in zip(optimizer.param_groups, lr_scheduler._last_lr):
        group["lr"] = learning_rate
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    if ema_model is not None:
        average = [
            like(shadow, value).to(shadow.device)
            for shadow, value in zip(ema_model.shadow_params, saved["ema"]["shadow_params"])
        ]
        ema_model.load_state_dict(saved["ema"] | {"shadow_params": average})


class StepLog:
    """Writes each step to `train_log.jsonl`, the tracker and the progress bar, and counts steps in `state`.

    Args:
        state: from `initial_state` or a checkpoint; changed in place.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, state: dict[str, int | float]) -> None:
        self.args = args
        self.accelerator = accelerator
        self.state = state
        self.path = Path(args.output_dir) / "train_log.jsonl"
        self.non_finite: dict[str, list[int]] = {}  # of the steps skipped in a row
        self.progress_bar = tqdm(
            total=args.max_train_steps,
            initial=state["global_step"],
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            for path in (self.path, self.path.with_name("validation_log.jsonl")):
                truncate_json_lines(path, state["global_step"])

    def skip(self, stats: StepStats) -> None:
        """Count and report a step whose gradients were not finite.

        Raises:
            RunError: with a diagnosis, after `--max_skipped_steps` of them in a row.
        """
        self.state["skipped_steps"] += 1
        self.state["skipped_in_a_row"] += 1
        for side, timesteps in stats.non_finite.items():
            self.non_finite.setdefault(side, []).extend(timesteps)
        if self.accelerator.is_main_process:
            in_a_row = self.state["skipped_in_a_row"]
            logger.warning(f"Skipped a step, its gradients were not finite ({in_a_row} in a row)")
        if self.state["skipped_in_a_row"] >= self.args.max_skipped_steps:
            raise RunError(self._diagnosis())

    def _diagnosis(self) -> str:
        gathered: dict[str, list[int]] = {}
        for part in gather_object([self.non_finite]) if self.accelerator.num_processes > 1 else [self.non_finite]:
            for side, timesteps in part.items():
                gathered.setdefault(side, []).extend(timesteps)
        precision = self.accelerator.mixed_precision
        what = " and ".join(
            f"the {side} loss was not finite at timesteps {min(found)} to {max(found)} ({len(found)} rows)"
            for side, found in gathered.items()
        )
        if not what:
            what = "every loss was finite and only gradients were not"
        if precision == "fp16":
            cure = "fp16 overflows here: use --mixed_precision bf16 or no"
        elif self.state["global_step"] == 0:
            cure = "no step was taken before, so look at the starting model and the images first"
        else:
            cure = "lower --learning_rate or --forget_scale, or leave out these timesteps by --timestep_range"
        return (
            f"the gradients of {self.state['skipped_in_a_row']} steps in a row were not finite, after"
            f" {self.state['global_step']} good ones, in precision {precision}: {what}; {cure}"
        )

    def write(self, stats: StepStats, learning_rate: float, seconds: float, **more: float) -> None:
        """Count and log a step that was taken."""
        self.state["skipped_in_a_row"] = 0
        self.non_finite = {}
        self.state["global_step"] += 1
        self.state["one_sided_steps"] += stats.one_sided and self.args.forget_scaling in ("relative", "norm", "nash")
        self.state["train_seconds"] += seconds
        if stats.grad_norm_forget is not None and not stats.one_sided:
            self.state["forget_scale"] = stats.forget_scale
        logs = {
            "keep_loss": stats.keep_loss,
            "forget_loss": stats.forget_loss,
            "grad_norm_keep": stats.grad_norm_keep,
            "grad_norm_forget": stats.grad_norm_forget,
            "forget_scale": stats.forget_scale,
            "lr": learning_rate,
        }
        if stats.forget_active is not None:
            logs["forget_active"] = stats.forget_active
        logs |= more
        known = {name: value for name, value in logs.items() if value is not None}
        self.progress_bar.update(1)
        self.progress_bar.set_postfix({name: f"{value:.3g}" for name, value in known.items()})
        self.accelerator.log(known, step=self.state["global_step"])
        if self.accelerator.is_main_process:
            append_json_line(self.path, {"step": self.state["global_step"], **logs, "step_seconds": seconds})


def log_validation(args: argparse.Namespace, accelerator: Accelerator, step: int, found: dict) -> None:
    """`found`, from `copy_statistics`, to `validation_log.jsonl` and the tracker."""
    append_json_line(Path(args.output_dir) / "validation_log.jsonl", {"step": step, **found})
    accelerator.log({"copy_share": found["copy_share"]}, step=step)


def log_sample_images(accelerator: Accelerator, name: str, images: torch.Tensor, step: int) -> None:
    """A batch of samples `(N, C, H, W)` in [0, 1] to the tracker."""
    pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pictures}, step=step, **layout)


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, project_name: str) -> None:
    if args.report_to != "none":
        # Without its metadata: wandb would record the command line, and with it the names of forget files.
        init_kwargs = {"wandb": {"settings": {"x_disable_meta": True}}}
        accelerator.init_trackers(project_name, config=shared_settings(args), init_kwargs=init_kwargs)


def write_report(
    folder: Path,
    args: argparse.Namespace,
    accelerator: Accelerator,
    method: Method,
    counts: dict[str, int],
    timestep_range: tuple[int, int],
    forget_timestep_ranges: list[tuple[int, int]],
    state: dict[str, int | float],
    **more: object,
) -> None:
    """`unlearning.json`: what was done, and nothing that tells to whom."""
    superfactor = None
    if args.forget_scaling == "fixed":
        # The paper's s for the same coefficient, c = s k / (n - k), with k counting the duplicates.
        superfactor = args.forget_scale * counts["keep"] / max(counts["forget"], counts["train"] - counts["keep"])
    # The name of a folder may tell more than it should.
    base_model = args.pretrained_model_name_or_path
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    write_json(
        folder / "unlearning.json",
        {
            "base_model": None if os.path.exists(base_model) else base_model,
            "method": method.name,
            "method_args": vars(method),
            "forget_scaling": args.forget_scaling,
            "forget_scale": args.forget_scale,
            "superfactor": superfactor,
            "data": counts,
            "settings": shared_settings(args),
            "timestep_range": timestep_range,
            "forget_timestep_ranges": forget_timestep_ranges,
            "num_processes": accelerator.num_processes,
            "pairs_per_step": args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
            **{name: value for name, value in state.items() if name not in ("skipped_in_a_row", "forget_scale")},
            **more,
            "versions": {"siss_diffusers": siss_diffusers.__version__} | {name: version(name) for name in packages},
        },
    )

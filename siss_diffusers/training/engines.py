"""Accelerate, and the engines that it launches: DDP, FSDP 2, DeepSpeed."""

import argparse
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from siss_diffusers.errors import UsageError
from siss_diffusers.flags import shared_settings
from siss_diffusers.gradients.engine import PairedGradients, StepStats
from siss_diffusers.training.state import saves_checkpoints


logger = logging.getLogger(__name__)


T = TypeVar("T")


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


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, project_name: str) -> None:
    if args.report_to != "none":
        # Without its metadata: wandb would record the command line, and with it the names of forget files.
        init_kwargs = {"wandb": {"settings": {"x_disable_meta": True}}}
        accelerator.init_trackers(project_name, config=shared_settings(args), init_kwargs=init_kwargs)

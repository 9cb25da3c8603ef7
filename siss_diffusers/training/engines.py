"""Accelerate, and the engines that it launches: DDP, FSDP 2, DeepSpeed."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from siss_diffusers.distributed import PATIENCE, check_launch
from siss_diffusers.errors import UsageError
from siss_diffusers.gradients import PairedGradients, StepStats
from siss_diffusers.settings import Settings


logger = logging.getLogger(__name__)


EXAMPLES = "see examples/accelerate"


def make_accelerator(settings: Settings, output_dir: Path) -> Accelerator:
    """Make the accelerator of a run.

    Raises:
        UsageError: under an engine that is not supported, or a setting that the engine does not support, or where the
            processes of the launch do not know of each other.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / settings.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    check_launch(accelerator.num_processes)
    check_engine(settings, accelerator)
    set_arithmetic(settings)
    return accelerator


def set_arithmetic(settings: Settings) -> None:
    """Set how GPUs multiply in float32, and whether every kernel must give the same bits each time."""
    # cuDNN's own default is True: convolutions would round to 10 bits where matrix products do not.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
        torch.backends.cudnn.benchmark = False
        # Not as a warning: with it, attention would choose the faster kernels.
        torch.use_deterministic_algorithms(True)


def set_up_logging(accelerator: Accelerator) -> None:
    """Set up logging for a program: our own lines, warnings of the libraries, and one progress bar.

    A program that calls the package as a library keeps its own set-up: only the scripts call this.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (datasets.utils.logging, diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # The http client reports every request it makes. Its name depends on the version of huggingface_hub.
    for client in ("httpx", "httpx2", "httpcore2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def check_engine(settings: Settings, accelerator: Accelerator) -> None:
    """Refuse what was not built, or cannot be exact, for the engine of the launcher; configure DeepSpeed.

    Raises:
        UsageError: naming what to use.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        configure_fsdp(settings, accelerator)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(settings, accelerator)
    elif accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise UsageError(f"Megatron-LM is not supported; use FSDP 2 or DDP ({EXAMPLES})")


def configure_fsdp(settings: Settings, accelerator: Accelerator) -> None:
    """Check what FSDP 2 supports, and let it sum gradients in float32.

    Raises:
        UsageError: naming what to use.
    """
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise UsageError(f"FSDP 1 is not supported; set `fsdp_version: 2` ({EXAMPLES}), or use DDP")
    refused = {
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
        "--use_8bit_adam": settings.use_8bit_adam,
        "--keep_target base without --use_lora": settings.keep_target == "base" and settings.adapter is None,
        "--offload_ema": settings.offload_ema,
        "`dynamo_config`": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "`fsdp_offload_params`": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    refuse(refused, "FSDP 2", "drop it (for fp16: use bf16), or use DDP")
    if plugin.mixed_precision_policy is not None:
        # accelerate would sum gradients in bf16, of which one is to be subtracted from the other.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def configure_deepspeed(settings: Settings, accelerator: Accelerator) -> None:
    """Check what DeepSpeed supports, and hand it one combined gradient for each step.

    Raises:
        UsageError: naming what to use.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    offloads = (config["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    refused = {
        f"ZeRO-{plugin.zero_stage}": plugin.zero_stage not in (1, 2),
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
        "offloading": any(offload.get("device", "none") != "none" for offload in offloads),
        "`dynamo_config`": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "--use_8bit_adam": settings.use_8bit_adam,
        "--keep_target base without --use_lora": settings.keep_target == "base" and settings.adapter is None,
        "--use_ema": settings.use_ema,
        "--resume_from_checkpoint": settings.resume_from_checkpoint is not None,
    }
    refuse(refused, "DeepSpeed", f"drop it, or use ZeRO-2 in bf16, FSDP 2 or DDP ({EXAMPLES})")
    config |= {
        "train_micro_batch_size_per_gpu": settings.train_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": settings.train_batch_size * accelerator.num_processes,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if accelerator.is_main_process:
        logger.warning("DeepSpeed: no checkpoint will be written, and a run that is stopped saves nothing")


def refuse(refused: dict[str, bool], engine: str, instead: str) -> None:
    """Raise a `UsageError` for the first setting that an engine does not support."""
    for what, given in refused.items():
        if given:
            raise UsageError(f"{what} is not supported under {engine}; {instead}")


def saves_checkpoints(accelerator: Accelerator) -> bool:
    """Tell whether checkpoints are written: not under DeepSpeed, which saves its part of the optimizer as pickles."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what accelerate makes of a network and its optimizer: without DDP around it on several processes.

    The gradient engine reduces both gradients itself, once per step. DDP would reduce nothing, and hold buckets of the size
    of another gradient.
    """
    alone = accelerator.num_processes == 1
    if alone or accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return accelerator.prepare(network, optimizer)
    model = accelerator.prepare_model(network, evaluation_mode=True)  # on its device, with autocast and compilation
    for parameter in network.parameters():
        if parameter.requires_grad:  # as DDP does at its start
            torch.distributed.broadcast(parameter.detach(), src=0)
    return model, accelerator.prepare_optimizer(optimizer)


def callable_network(accelerator: Accelerator, model: nn.Module) -> Callable[..., Any]:
    """Return what to call for a prediction in training: under DeepSpeed the network itself, not the engine around it,
    whose hooks would take every backward for one of theirs."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return model
    return accelerator.unwrap_model(model)


def take_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, gradients: PairedGradients, stats: StepStats
) -> None:
    """Step down the combined gradient; of a skipped step there is none."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        optimizer.step()
    elif not stats.skipped:
        accelerator.backward(gradients.surrogate_loss(), scale_wrt_gas=False)  # which steps, too


def make_optimizer(settings: Settings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make AdamW, in 8 bits where asked for."""
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if settings.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )

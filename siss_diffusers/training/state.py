"""The state of a run: its progress, and how it is saved and restored."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn

from siss_diffusers.gradients.buffers import local
from siss_diffusers.storage.checkpoints import is_saved, save_checkpoint, save_result
from siss_diffusers.storage.sharding import is_sharded, like
from siss_diffusers.storage.tensors import save_state


logger = logging.getLogger(__name__)


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

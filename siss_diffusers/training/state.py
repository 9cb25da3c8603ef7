"""The state of a run: its progress, and everything else of a checkpoint but the weights."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from siss_diffusers.storage.sharding import like
from siss_diffusers.storage.tensors import save_state


@dataclass
class Progress:
    """How far a run is. There is no random state: every draw is keyed by its window.

    Attributes:
        global_step: optimizer steps taken.
        window: windows of pairs that were drawn. They count skipped steps too, so that a skipped step is not tried again
            with the same draws.
        forget_scale: that of the last step that found its own.
    """

    global_step: int = 0
    window: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    one_sided_steps: int = 0
    train_seconds: float = 0.0
    forget_scale: float | None = None


def save_training_state(
    folder: Path | None,
    accelerator: Accelerator,
    run: dict,
    progress: Progress,
    thresholds: torch.Tensor | None,
    searched: dict[str, torch.Tensor] | None,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema_model: EMAModel | None,
) -> None:
    """Save everything of a checkpoint but the weights.

    Args:
        folder: None on the ranks that only hand over their shards.
        run: from `describe_run`.
        searched: adversarial conditions; None for none.
    """
    save_state(
        folder,
        {
            "run": run,
            "progress": asdict(progress),
            "thresholds": thresholds,
            "searched": searched,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "ema": None if ema_model is None else ema_model.state_dict(),
        },
    )


def restore_training_state(
    saved: dict,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema_model: EMAModel | None,
) -> None:
    """Restore the optimizer, the schedule, the scaler and the average that `save_training_state` saved.

    Hyperparameters of the optimizer and the schedule stay those of the settings: they are the saved ones, or were
    changed on purpose.

    Args:
        saved: from `load_state`.
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

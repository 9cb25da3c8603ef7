"""What both scripts do around their training loop: accelerator, optimizer, the log of a step, the report of a run."""

import argparse
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

import siss_diffusers
from siss_diffusers.arguments import shared_settings
from siss_diffusers.checkpoints import append_json_line, save_state, truncate_json_lines, write_json
from siss_diffusers.errors import UsageError
from siss_diffusers.gradients import StepStats
from siss_diffusers.methods import Method


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerator and logging for the shared flags.

    Raises:
        UsageError: under an engine that the scripts do not support.
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
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(
            f"{accelerator.distributed_type.value} is not supported yet; use `accelerate launch --multi_gpu` (DDP)"
        )
    # What the launcher or its configuration said, where the flag said nothing.
    args.mixed_precision = accelerator.mixed_precision

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


def make_optimizer(args: argparse.Namespace, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, in 8 bits where asked for."""
    optimizer_class = torch.optim.AdamW
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
    if ema_model is not None:
        ema_model.store(parameters)
        ema_model.copy_to(parameters)
    try:
        yield
    finally:
        if ema_model is not None:
            ema_model.restore(parameters)


def initial_state() -> dict[str, int | float]:
    """The progress of a run, saved with its checkpoints. There is no random state, for draws are keyed by their window;
    windows count the skipped steps too, so that a skipped step is not tried again with the same draws."""
    return {
        "global_step": 0,
        "window": 0,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "one_sided_steps": 0,
        "train_seconds": 0.0,
    }


def save_training_state(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, int | float],
    thresholds: torch.Tensor | None,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema_model: EMAModel | None,
) -> None:
    """Everything of a checkpoint but the weights."""
    save_state(
        folder,
        {
            "progress": state,
            "thresholds": thresholds,
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
    """The inverse of `save_training_state`, from `load_state`, for what is not returned by it plainly."""
    optimizer.load_state_dict(saved["optimizer"])
    lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    if ema_model is not None:
        ema_model.load_state_dict(saved["ema"])


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
        self.progress_bar = tqdm(
            total=args.max_train_steps,
            initial=state["global_step"],
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            for path in (self.path, self.path.with_name("validation_log.jsonl")):
                truncate_json_lines(path, state["global_step"])

    def skip(self) -> None:
        """Count a step whose gradients were not finite.

        Raises:
            RuntimeError: after `--max_skipped_steps` of them in a row.
        """
        self.state["skipped_steps"] += 1
        self.state["skipped_in_a_row"] += 1
        if self.state["skipped_in_a_row"] >= self.args.max_skipped_steps:
            raise RuntimeError(
                f"the gradients of {self.state['skipped_in_a_row']} steps in a row were not finite; lower"
                " --learning_rate or --forget_scale, or use bf16 instead of fp16"
            )

    def write(self, stats: StepStats, learning_rate: float, seconds: float, **more: float) -> None:
        """Count and log a step that was taken."""
        self.state["skipped_in_a_row"] = 0
        self.state["global_step"] += 1
        self.state["one_sided_steps"] += stats.one_sided and self.args.forget_scaling in ("relative", "norm", "nash")
        self.state["train_seconds"] += seconds
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
    args: argparse.Namespace,
    accelerator: Accelerator,
    method: Method,
    counts: dict[str, int],
    timestep_range: tuple[int, int],
    state: dict[str, int | float],
    **more: object,
) -> None:
    """`unlearning.json`: what was done, and nothing that tells to whom."""
    superfactor = None
    if args.forget_scaling == "fixed":
        # The paper's s for the same coefficient, c = s k / (n - k), with k counting the duplicates.
        superfactor = args.forget_scale * counts["keep"] / max(counts["forget"], counts["train"] - counts["keep"])
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    write_json(
        Path(args.output_dir) / "unlearning.json",
        {
            "method": method.name,
            "method_args": vars(method),
            "forget_scaling": args.forget_scaling,
            "forget_scale": args.forget_scale,
            "superfactor": superfactor,
            "data": counts,
            "settings": shared_settings(args),
            "timestep_range": timestep_range,
            "num_processes": accelerator.num_processes,
            "pairs_per_step": args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
            **{name: value for name, value in state.items() if name != "skipped_in_a_row"},
            **more,
            "versions": {"siss_diffusers": siss_diffusers.__version__} | {name: version(name) for name in packages},
        },
    )

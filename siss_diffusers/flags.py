"""The flags that both training scripts share, their help, and the checks that need no model and no data."""

import argparse
import importlib.util
import os

import torch

from siss_diffusers.calibration import CALIBRATED_SCALE, DEFAULT_QUANTILE
from siss_diffusers.combine import DEFAULT_SCALE, FORGET_SCALINGS, Rule, scaling_rule
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import METHODS, Method, make_method
from siss_diffusers.parsing import (
    add_forget_set_arguments,
    check_forget_set_arguments,
    natural_number,
    non_negative_float,
    positive_int,
    quantile_or_off,
    seed_number,
    unit_float,
)


def add_training_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str,
    output_dir: str,
    learning_rate: str,
    adam_beta1: float,
    adam_weight_decay: float,
) -> None:
    """The flags that the official scripts have in common, under their names.

    Args:
        model: help of `--pretrained_model_name_or_path`.
        learning_rate: help of `--learning_rate`, whose default depends on other flags.
    """
    parser.add_argument("--pretrained_model_name_or_path", type=str, required=True, help=model)
    parser.add_argument("--revision", type=str, default=None, help="Revision of the model on the Hub.")
    parser.add_argument("--variant", type=str, default=None, help="Variant of the model's files, such as fp16.")
    parser.add_argument(
        "--dataset_name",
        type=str,
        default=None,
        help="The training set: a name on the Hub, or a local folder that `datasets.load_dataset` understands.",
    )
    parser.add_argument("--dataset_config_name", type=str, default=None, help="The configuration of the data set.")
    parser.add_argument(
        "--train_data_dir",
        type=str,
        default=None,
        help="The training set as a folder of images, with or without a metadata.jsonl; or use --dataset_name.",
    )
    parser.add_argument("--image_column", type=str, default="image", help="The column of the images.")
    parser.add_argument(
        "--output_dir", type=str, default=output_dir, help="Where the result and the checkpoints are written."
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace what an earlier run left in --output_dir."
    )
    parser.add_argument("--cache_dir", type=str, default=None, help="Where downloaded models and data sets are kept.")
    parser.add_argument("--seed", type=seed_number, default=0, help="Seed of every draw.")
    parser.add_argument(
        "--resolution", type=positive_int, default=None, help="Images are resized to this; default: the model's own."
    )
    parser.add_argument(
        "--center_crop", action="store_true", help="Crop the middle of images that are not square, not a random part."
    )
    parser.add_argument("--random_flip", action="store_true", help="Flip images horizontally at random.")
    parser.add_argument(
        "--train_batch_size",
        type=positive_int,
        default=16,
        help="Pairs of a keep and a forget image per process and micro-batch.",
    )
    parser.add_argument(
        "--dataloader_num_workers", type=natural_number, default=0, help="Subprocesses for loading images."
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="Micro-batches per optimizer step."
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="Trade a second forward pass for activation memory."
    )
    parser.add_argument("--learning_rate", type=non_negative_float, default=None, help=learning_rate)
    parser.add_argument(
        "--lr_scheduler",
        type=str,
        default="constant",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        help="Schedule of the learning rate; constant by default.",
    )
    parser.add_argument("--lr_warmup_steps", type=natural_number, default=0, help="Optimizer steps of warm-up.")
    parser.add_argument("--use_8bit_adam", action="store_true", help="Use bitsandbytes' 8-bit AdamW.")
    parser.add_argument("--adam_beta1", type=unit_float, default=adam_beta1, help="beta1 of AdamW.")
    parser.add_argument("--adam_beta2", type=unit_float, default=0.999, help="beta2 of AdamW.")
    parser.add_argument(
        "--adam_weight_decay", type=non_negative_float, default=adam_weight_decay, help="Weight decay of AdamW."
    )
    parser.add_argument("--adam_epsilon", type=non_negative_float, default=1e-08, help="Epsilon of AdamW.")
    parser.add_argument(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="Bound of the gradient norm, of losses summed over pixels as in the papers: 1.0 clips nearly every step.",
    )
    parser.add_argument(
        "--use_ema", action="store_true", help="Save an exponential moving average of the weights instead of the last."
    )
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the result when done.")
    parser.add_argument("--hub_token", type=str, default=None, help="The token for the Hub.")
    parser.add_argument("--hub_model_id", type=str, default=None, help="The repository; default: --output_dir's name.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    parser.add_argument(
        "--report_to",
        "--logger",
        type=str,
        default="tensorboard",
        choices=["tensorboard", "wandb", "none"],
        help="Where metrics are logged, beside train_log.jsonl.",
    )
    parser.add_argument("--logging_dir", type=str, default="logs", help="Folder within --output_dir for the tracker.")
    parser.add_argument(
        "--mixed_precision",
        type=str,
        default=None,
        choices=["no", "fp16", "bf16"],
        help="Default: what `accelerate launch` or its configuration says.",
    )
    parser.add_argument("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs multiply in TF32.")
    parser.add_argument(
        "--prediction_type",
        type=str,
        default=None,
        choices=["epsilon", "v_prediction", "sample"],
        help="What the model predicts; default: what its scheduler says.",
    )
    parser.add_argument(
        "--checkpointing_steps", type=positive_int, default=500, help="Save a checkpoint every so many steps."
    )
    parser.add_argument(
        "--checkpoints_total_limit", type=positive_int, default=None, help="How many checkpoints are kept."
    )
    parser.add_argument(
        "--resume_from_checkpoint", type=str, default=None, help="A checkpoint of --output_dir, or `latest`."
    )
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="Resume with other arguments or data than the checkpoint was made with.",
    )
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="Use xformers' attention."
    )


def check_training_arguments(args: argparse.Namespace) -> None:
    """What the official flags may not be, on this machine.

    Raises:
        UsageError: naming the flag.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise UsageError("give the training set by either --train_data_dir or --dataset_name")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UsageError("--mixed_precision fp16 needs a GPU and this machine has none; use bf16 or no")
    for flag, value, package in (
        ("--report_to tensorboard", args.report_to == "tensorboard", "tensorboard"),
        ("--report_to wandb", args.report_to == "wandb", "wandb"),
        ("--use_8bit_adam", args.use_8bit_adam, "bitsandbytes"),
        ("--enable_xformers_memory_efficient_attention", args.enable_xformers_memory_efficient_attention, "xformers"),
    ):
        if value and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag} needs `pip install {package}`")


def add_unlearning_arguments(parser: argparse.ArgumentParser, *, calibrate_by_default: bool) -> None:
    """Section "unlearning" of `--help`."""
    group = parser.add_argument_group("unlearning")
    listed = "; ".join(
        f"{name}: {method.summary}"
        + "".join(f", {key}={default}" for key, default in method.hyperparameters().items())
        for name, method in METHODS.items()
    )
    group.add_argument(
        "--method", type=str, default="siss", choices=list(METHODS), metavar="METHOD", help=f"One of: {listed}."
    )
    group.add_argument(
        "--method_args",
        type=str,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="Hyperparameters of the method, such as lam=0.5; their defaults stand beside the methods.",
    )
    group.add_argument(
        "--forget_scaling",
        type=str,
        default=None,
        choices=FORGET_SCALINGS,
        help=(
            "How much of the forget gradient g_f is subtracted from the keep gradient g_k. relative (default):"
            " F |g_k| / |g_f|; norm: F / |g_f|, the papers' scaling_norm; fixed: F; nash: the bargaining solution of"
            " MUNBa."
        ),
    )
    group.add_argument(
        "--forget_scale",
        type=non_negative_float,
        default=None,
        metavar="F",
        help=(
            "F of --forget_scaling. Default: 0.1 for fixed, for relative 1 with --calibrate_forgetting and 0.1 without;"
            " required for norm."
        ),
    )
    group.add_argument(
        "--forget_scale_every",
        type=positive_int,
        default=1,
        metavar="K",
        help=(
            "Take the norms of --forget_scaling relative or norm every K steps only. A step in between subtracts as much"
            " as the last of them, and costs a single gradient. Default: 1, every step."
        ),
    )
    by_default = f"on, at {DEFAULT_QUANTILE}, under --forget_scaling relative" if calibrate_by_default else "off"
    group.add_argument(
        "--calibrate_forgetting",
        type=quantile_or_off,
        nargs="?",
        const=DEFAULT_QUANTILE,
        default=None,
        metavar="QUANTILE",
        help=(
            f"Push a forget image only until its loss reaches this quantile ({DEFAULT_QUANTILE} if not given) of the"
            " losses that the starting model has on images to keep, at the same noise level; or `off`. Default:"
            f" {by_default}."
        ),
    )
    add_forget_set_arguments(group)
    group.add_argument(
        "--timestep_range",
        type=natural_number,
        nargs=2,
        default=None,
        metavar=("LO", "HI"),
        help="Train on timesteps LO <= t < HI only; all by default.",
    )
    group.add_argument(
        "--forget_timestep_ranges",
        type=natural_number,
        nargs="+",
        default=None,
        metavar="LO HI",
        help=(
            "Forget at timesteps LO <= t < HI only, while the images to keep are learned at all of --timestep_range,"
            " which is the default. Several ranges are trained in steps of their own, so that the scaling rule weighs"
            " each by itself: 300 1000 0 300."
        ),
    )
    group.add_argument(
        "--forget_timestep_schedule",
        type=str,
        choices=["alternate", "sequential"],
        default="alternate",
        help=(
            "When several --forget_timestep_ranges are trained: `alternate`, in turns, a step each; `sequential`, one"
            " after the other, an equal share of the steps each (a range named twice has two). Default: alternate."
        ),
    )
    group.add_argument(
        "--validation_steps",
        type=positive_int,
        default=None,
        help="Count the copies among fresh samples every so many steps; never by default.",
    )
    group.add_argument(
        "--num_validation_images", type=positive_int, default=256, help="Samples of each such validation."
    )
    group.add_argument(
        "--stop_when_forgotten",
        action="store_true",
        help="Stop at the first validation that finds no copy.",
    )
    group.add_argument(
        "--max_skipped_steps",
        type=positive_int,
        default=20,
        help="Give up after so many steps in a row whose gradients were not finite.",
    )


def check_forget_timestep_ranges(args: argparse.Namespace, method: Method) -> None:
    """Turns the numbers of --forget_timestep_ranges into pairs `(lo, hi)`."""
    if not method.has_both_sides:
        fitting = ", ".join(name for name, known in METHODS.items() if known.has_both_sides)
        raise UsageError(
            f"--forget_timestep_ranges needs a keep side and a forget side, not --method {method.name}; use"
            f" --timestep_range, or {fitting}"
        )
    numbers = args.forget_timestep_ranges
    if len(numbers) % 2 == 1:
        raise UsageError(f"--forget_timestep_ranges takes LO HI for each range, an even number, not {len(numbers)}")
    args.forget_timestep_ranges = list(zip(numbers[::2], numbers[1::2]))
    for low, high in args.forget_timestep_ranges:
        if low >= high:
            raise UsageError(f"--forget_timestep_ranges {low} {high}: LO must be below HI")
        if args.timestep_range is not None and (low < args.timestep_range[0] or high > args.timestep_range[1]):
            outer = "{} {}".format(*args.timestep_range)
            raise UsageError(f"--forget_timestep_ranges {low} {high} must lie within --timestep_range {outer}")
    if len(numbers) > 2 and args.forget_scale_every > 1:
        raise UsageError(
            "--forget_scale_every needs a single range in --forget_timestep_ranges, for each has a scale of its own;"
            " drop one of the two flags"
        )


def check_forget_timestep_schedule(args: argparse.Namespace) -> None:
    """Nothing is trained one after the other unless there are several ranges."""
    count = len(args.forget_timestep_ranges or ())
    if args.forget_timestep_schedule == "sequential" and count < 2:
        raise UsageError(
            f"--forget_timestep_schedule sequential needs several ranges in --forget_timestep_ranges, not {count};"
            " give more, or drop the flag"
        )


def check_unlearning_arguments(args: argparse.Namespace, *, calibrate_by_default: bool) -> tuple[Method, Rule]:
    """The method and the rule that the arguments mean; fills in the defaults of the scaling rule and of calibration.

    Raises:
        UsageError: naming the flag, for anything that cannot be used.
    """
    try:
        method = make_method(args.method, args.method_args)
    except ValueError as error:
        raise UsageError(f"--method_args: {error}")
    if (args.forget_scaling is not None or args.forget_scale is not None) and not method.takes_scaling:
        fitting = ", ".join(name for name, known in METHODS.items() if known.takes_scaling)
        raise UsageError(
            f"--forget_scaling and --forget_scale do not apply to --method {method.name}; drop them, or use {fitting}"
        )
    if method.takes_scaling:
        args.forget_scaling = args.forget_scaling or "relative"
        if calibrate_by_default and args.calibrate_forgetting is None and args.forget_scaling == "relative":
            args.calibrate_forgetting = DEFAULT_QUANTILE
    if args.calibrate_forgetting == "off":
        args.calibrate_forgetting = None
    if method.takes_scaling and args.forget_scale is None and args.forget_scaling in ("relative", "fixed"):
        calibrated = args.forget_scaling == "relative" and args.calibrate_forgetting is not None
        args.forget_scale = CALIBRATED_SCALE if calibrated else DEFAULT_SCALE
    if args.forget_scale_every > 1 and args.forget_scaling not in ("relative", "norm"):
        raise UsageError("--forget_scale_every needs --forget_scaling relative or norm; drop it")
    try:
        scaling = scaling_rule(args.forget_scaling or "relative", args.forget_scale)
    except ValueError as error:
        raise UsageError(f"--forget_scale: {error}")
    if args.calibrate_forgetting is not None and not method.subtracts_forget:
        fitting = ", ".join(name for name, known in METHODS.items() if known.subtracts_forget)
        raise UsageError(
            f"--calibrate_forgetting needs a subtracted forget side, not --method {method.name}; use {fitting}"
        )
    check_forget_set_arguments(args)
    if args.timestep_range is not None and args.timestep_range[0] >= args.timestep_range[1]:
        raise UsageError("--timestep_range LO HI needs LO below HI")
    if args.forget_timestep_ranges is not None:
        check_forget_timestep_ranges(args, method)
    check_forget_timestep_schedule(args)
    if args.stop_when_forgotten and args.validation_steps is None:
        raise UsageError("--stop_when_forgotten needs --validation_steps, which says how often to look")
    return method, method.rule(scaling)


def shared_settings(args: argparse.Namespace) -> dict[str, int | float | bool | str]:
    """The arguments that may be published: numbers, switches and names of ours, never a path, file name or value."""
    names = {
        "method",
        "forget_scaling",
        "forget_timestep_schedule",
        "lr_scheduler",
        "mixed_precision",
        "prediction_type",
        "ddpm_beta_schedule",
    }
    return {
        name: value
        for name, value in vars(args).items()
        if isinstance(value, int | float) or (name in names and value is not None)
    }

"""Checks across settings, which need no model and no data, and the defaults that depend on other settings."""

import importlib.util
import os
from dataclasses import fields

import torch

from siss_diffusers.calibration import CALIBRATED_SCALE, DEFAULT_QUANTILE
from siss_diffusers.combine import DEFAULT_SCALE, Rule, scaling_rule
from siss_diffusers.errors import UsageError
from siss_diffusers.methods import METHODS, Method, make_method
from siss_diffusers.parsing import check_forget_set_arguments
from siss_diffusers.settings.fields import flag_name
from siss_diffusers.settings.shared import Settings


def resolve(settings: Settings) -> tuple[Settings, Method, Rule]:
    """Check settings and fill in the defaults that depend on others, but for those that depend on the model.

    Returns:
        The settings of the run, its method, and the rule that combines the two gradients.

    Raises:
        UsageError: naming the flag and the cure.
    """
    check_machine(settings)
    check_forget_set_arguments(settings)
    check_lengths(settings)
    method = method_of(settings)
    settings = settings.check_own()
    settings = with_scaling_defaults(settings, method)
    settings = with_timestep_ranges(settings, method)
    try:
        scaling = scaling_rule(settings.forget_scaling or "relative", settings.forget_scale)
    except ValueError as error:
        raise UsageError(f"--forget_scale: {error}")
    if settings.max_train_steps is None and settings.num_train_epochs is None:
        settings = settings.replace(max_train_steps=settings.default_steps)
    return settings, method, method.rule(scaling)


def check_machine(settings: Settings) -> None:
    """Refuse what this machine cannot do.

    Raises:
        UsageError: naming the flag.
    """
    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UsageError("--mixed_precision fp16 needs a GPU and this machine has none; use bf16 or no")
    for flag, wanted, package in (
        ("--report_to tensorboard", settings.report_to == "tensorboard", "tensorboard"),
        ("--report_to wandb", settings.report_to == "wandb", "wandb"),
        ("--use_8bit_adam", settings.use_8bit_adam, "bitsandbytes"),
        (
            "--enable_xformers_memory_efficient_attention",
            settings.enable_xformers_memory_efficient_attention,
            "xformers",
        ),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag} needs `pip install {package}`")


def check_lengths(settings: Settings) -> None:
    """Refuse settings about how long to train, and when to look, that exclude or need each other.

    Raises:
        UsageError: naming the flags.
    """
    flags = {field.name: flag_name(field) for field in fields(settings)}
    for first, second in (("max_train_steps", "num_train_epochs"), ("validation_steps", "validation_epochs")):
        if getattr(settings, first) is not None and getattr(settings, second) is not None:
            raise UsageError(f"--{flags[first]} and --{flags[second]} exclude each other; give one")
    if settings.stop_when_forgotten and settings.validation_steps is None and settings.validation_epochs is None:
        raise UsageError(
            "--stop_when_forgotten needs --validation_steps or --validation_epochs, which say how often to look"
        )
    if settings.offload_ema and not settings.use_ema:
        raise UsageError("--offload_ema needs --use_ema")


def method_of(settings: Settings) -> Method:
    """Build the method, and refuse settings that do not apply to it.

    Raises:
        UsageError: naming the flag and the methods that it applies to.
    """
    try:
        method = make_method(settings.method, list(settings.method_args))
    except ValueError as error:
        raise UsageError(f"--method_args: {error}")

    def methods_with(attribute: str) -> str:
        return ", ".join(name for name, known in METHODS.items() if getattr(known, attribute))

    if (settings.forget_scaling is not None or settings.forget_scale is not None) and not method.takes_scaling:
        raise UsageError(
            f"--forget_scaling and --forget_scale do not apply to --method {method.name}; drop them, or use"
            f" {methods_with('takes_scaling')}"
        )
    check_calibration(settings, method)
    if settings.keep_target == "base" and not method.learns_keep:
        raise UsageError(
            f"--keep_target base: --method {method.name} does not learn from images to keep; drop it, or use"
            f" {methods_with('learns_keep')}"
        )
    if settings.forget_timestep_ranges is not None and not method.has_both_sides:
        raise UsageError(
            f"--forget_timestep_ranges does not apply to --method {method.name}, which learns from one kind of image; use"
            f" --timestep_range, or {methods_with('has_both_sides')}"
        )
    return method


def check_calibration(settings: Settings, method: Method) -> None:
    """Refuse settings of calibrated forgetting and of redirection that do not apply.

    Raises:
        UsageError: naming the flag and the methods that it applies to.
    """
    quantile = settings.calibrate_forgetting
    if quantile not in (None, "off") and not has_thresholds(method):
        calibrated = ", ".join(name for name, known in METHODS.items() if has_thresholds(known))
        raise UsageError(
            f"--calibrate_forgetting does not apply to --method {method.name}; drop it, or use {calibrated}"
        )
    default = type(settings).__dataclass_fields__["num_redirect_images"].default
    if settings.num_redirect_images != default and "posterior_mean" not in method.needs:
        redirecting = ", ".join(name for name, known in METHODS.items() if "posterior_mean" in known.needs)
        raise UsageError(
            f"--num_redirect_images does not apply to --method {method.name}; drop it, or use {redirecting}"
        )


def has_thresholds(method: Method | type[Method]) -> bool:
    """Tell whether thresholds of the loss can say how far a forget image is pushed."""
    return method.subtracts_forget or "thresholds" in method.needs


def with_scaling_defaults(settings: Settings, method: Method) -> Settings:
    """Fill in the scaling rule, its scale and the quantile of calibration.

    Raises:
        UsageError: for --forget_scale_every with a rule that takes no norms, or --threshold_source without calibration.
    """
    scaling, scale, quantile = settings.forget_scaling, settings.forget_scale, settings.calibrate_forgetting
    if method.takes_scaling:
        scaling = scaling or "relative"
        if settings.calibrates_by_default and quantile is None and scaling == "relative":
            quantile = DEFAULT_QUANTILE
    if quantile is None and "thresholds" in method.needs:
        quantile = DEFAULT_QUANTILE
    if quantile == "off":
        quantile = None
    if settings.threshold_source is not None and quantile is None:
        raise UsageError("--threshold_source needs --calibrate_forgetting; add it, or drop this one")
    if method.takes_scaling and scale is None and scaling in ("relative", "fixed", "project"):
        scale = CALIBRATED_SCALE if scaling != "fixed" and quantile is not None else DEFAULT_SCALE
    if settings.forget_scale_every > 1 and scaling not in ("relative", "norm"):
        raise UsageError("--forget_scale_every needs --forget_scaling relative or norm; drop it")
    return settings.replace(forget_scaling=scaling, forget_scale=scale, calibrate_forgetting=quantile)


def with_timestep_ranges(settings: Settings, method: Method) -> Settings:
    """Turn the numbers of --timestep_range and --forget_timestep_ranges into pairs `(lo, hi)`.

    Raises:
        UsageError: for a range that is empty, lies outside, or does not go with another setting.
    """
    if settings.timestep_range is not None:
        if len(settings.timestep_range) != 2 or settings.timestep_range[0] >= settings.timestep_range[1]:
            raise UsageError("--timestep_range LO HI needs LO below HI")
    numbers = settings.forget_timestep_ranges
    count = 0 if numbers is None else len(numbers) // 2
    if settings.forget_timestep_schedule == "sequential" and count < 2:
        raise UsageError(
            f"--forget_timestep_schedule sequential needs several ranges in --forget_timestep_ranges, not {count};"
            " give more, or drop the flag"
        )
    if numbers is None:
        return settings
    if len(numbers) % 2 == 1:
        raise UsageError(f"--forget_timestep_ranges takes LO HI for each range, an even number, not {len(numbers)}")
    ranges = list(zip(numbers[::2], numbers[1::2]))
    for low, high in ranges:
        if low >= high:
            raise UsageError(f"--forget_timestep_ranges {low} {high}: LO must be below HI")
        outer = settings.timestep_range
        if outer is not None and (low < outer[0] or high > outer[1]):
            raise UsageError(
                f"--forget_timestep_ranges {low} {high} must lie within --timestep_range {outer[0]} {outer[1]}"
            )
    if count > 1 and settings.forget_scale_every > 1:
        raise UsageError(
            "--forget_scale_every needs a single range in --forget_timestep_ranges, because each has a scale of its own;"
            " drop one of the two flags"
        )
    return settings.replace(forget_timestep_ranges=ranges)

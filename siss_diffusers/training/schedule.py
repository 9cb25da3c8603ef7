"""What changes from step to step: the timesteps of forgetting, and when its scale is measured anew."""

import inspect
from typing import Any

from siss_diffusers.errors import UsageError
from siss_diffusers.noising import GaussianPath
from siss_diffusers.settings import Settings
from siss_diffusers.training.state import Progress


# The flags of `Settings.scheduler_overrides`.
SCHEDULER_FLAGS = {
    "prediction_type": "--prediction_type",
    "num_train_timesteps": "--ddpm_num_steps",
    "beta_schedule": "--ddpm_beta_schedule",
}


def check_noise_levels(settings: Settings, scheduler: Any, path: GaussianPath) -> None:
    """Check that the scheduler has what the settings replace in it, and that its path has the weights they ask for.

    Raises:
        UsageError: naming the flag.
    """
    parameters = inspect.signature(type(scheduler).__init__).parameters
    for name in settings.scheduler_overrides:
        if name not in parameters:
            raise UsageError(
                f"{SCHEDULER_FLAGS[name]} cannot be used: the {type(scheduler).__name__} of this model has no {name};"
                " leave it out"
            )
    if settings.weighting_scheme != "none" and path.prediction_type != "flow_prediction":
        raise UsageError(
            f"--weighting_scheme {settings.weighting_scheme} cannot be used: it is for models of flow matching; leave it out"
        )
    if settings.snr_gamma is not None and path.prediction_type == "flow_prediction":
        raise UsageError("--snr_gamma cannot be used: its weights are not defined for flow matching; leave it out")


def timestep_ranges(settings: Settings, num_timesteps: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the `(lo, hi)` of training and those of forgetting, with the defaults filled in.

    Raises:
        UsageError: for one that goes beyond the model's timesteps.
    """
    timestep_range = tuple(settings.timestep_range or (0, num_timesteps))
    forget_ranges = settings.forget_timestep_ranges or [timestep_range]
    for flag, ranges in (("timestep_range", [timestep_range]), ("forget_timestep_ranges", forget_ranges)):
        if max(high for _, high in ranges) > num_timesteps:
            raise UsageError(f"--{flag}: HI must not exceed the model's {num_timesteps} timesteps")
    return timestep_range, forget_ranges


def current_forget_range(
    settings: Settings, forget_ranges: list[tuple[int, int]], progress: Progress
) -> tuple[int, int]:
    """Return the `(lo, hi)` in which the next step forgets. A skipped step takes no share of a sequence away."""
    if settings.forget_timestep_schedule == "sequential":
        return forget_ranges[progress.global_step * len(forget_ranges) // settings.max_train_steps]
    return forget_ranges[progress.window % len(forget_ranges)]


def lagged_forget_scale(settings: Settings, progress: Progress) -> float | None:
    """Return the scale of an earlier step (--forget_scale_every); None where this step has to find its own."""
    return None if progress.window % settings.forget_scale_every == 0 else progress.forget_scale

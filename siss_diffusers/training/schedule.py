"""Which timesteps a step forgets at."""

import argparse

from siss_diffusers.errors import UsageError


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

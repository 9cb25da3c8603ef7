"""What one optimizer step saw."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step saw. Losses are weighted means over pairs and pixels, norms are those of the gradients
    of losses summed over pixels; None where a scaling rule never forms the quantity.

    Args:
        forget_scale: c of the step `g_keep - c g_forget`, after calibration; as given, of a step with a lagged one.
        forget_active: share of the forget weight whose loss is still below its threshold; None without thresholds.
        one_sided: no row of the window served the keep side, or none the forget side.
        skipped: a gradient was not finite. The optimizer must not move the weights; see `PairedGradients.compute`.
        non_finite: of a skipped step, for each side the timesteps (indices of the path) of this rank's rows whose loss
            was not finite; empty where only a gradient was not.
        stop: some rank asked to stop, see `PairedGradients.compute`; the same on all ranks.
    """

    keep_loss: float
    forget_loss: float
    grad_norm_keep: float | None
    grad_norm_forget: float | None
    grad_norm: float
    forget_scale: float
    forget_active: float | None
    one_sided: bool
    skipped: bool
    non_finite: dict[str, list[int]]
    stop: bool

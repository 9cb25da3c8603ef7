"""What is compared: a setting for each variant, the same for every model, and what a run of it costs."""

from dataclasses import dataclass
from typing import Any

from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS


Settings = dict[str, Any]
# A row of training is a forward and a backward pass, three times the work of a forward pass alone.
FORWARD_ONLY = 1 / 3
THRESHOLD_ROWS = NUM_BINS * DRAWS_PER_BIN


@dataclass(frozen=True)
class Variant:
    """A method with its setting.

    Args:
        settings: of `unlearn`.
        rows_per_pair: rows that the network is trained on for each pair.
        forward_rows_per_pair: rows of a forward pass alone.
        thresholds: kinds of images whose losses are measured beforehand.
        then: settings of a second phase, which takes half of the budget; None for a single phase.
        needs_prompts: whether it is for text-to-image models alone.
    """

    settings: Settings
    rows_per_pair: float = 1.0
    forward_rows_per_pair: float = 0.0
    thresholds: int = 0
    then: Settings | None = None
    needs_prompts: bool = False

    @property
    def phases(self) -> list[Settings]:
        return [self.settings] if self.then is None else [self.settings, self.then]

    def steps(self, budget: int, pairs: int) -> int:
        """Return the steps of a phase that the budget, in rows of training, pays for."""
        left = budget / len(self.phases) - self.thresholds * THRESHOLD_ROWS * FORWARD_ONLY
        return max(1, int(left / (pairs * (self.rows_per_pair + self.forward_rows_per_pair * FORWARD_ONLY))))


CALIBRATED = {"method": "siss", "forget_scaling": "relative", "forget_scale": 1.0, "calibrate_forgetting": 0.75}

VARIANTS = {
    "redirect": Variant({"method": "redirect"}, thresholds=2),
    "siss, calibrated": Variant(CALIBRATED, thresholds=1),
    "siss": Variant(
        {"method": "siss", "forget_scaling": "relative", "forget_scale": 0.1, "calibrate_forgetting": "off"}
    ),
    "retrack": Variant({"method": "retrack"}, rows_per_pair=2.0),
    "redirect, keep target of the base": Variant(
        {"method": "redirect", "keep_target": "base"}, forward_rows_per_pair=0.5, thresholds=2, needs_prompts=True
    ),
    "redirect, then siss at low noise": Variant(
        {"method": "redirect"}, thresholds=2, then=CALIBRATED | {"forget_timestep_ranges": [0, 300]}
    ),
}

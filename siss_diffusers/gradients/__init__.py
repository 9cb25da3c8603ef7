"""Two gradients per optimizer step, combined by the rule of a method."""

from siss_diffusers.gradients.engine import PairedGradients
from siss_diffusers.gradients.stats import StepStats


__all__ = ["PairedGradients", "StepStats"]

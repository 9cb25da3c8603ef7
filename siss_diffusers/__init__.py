"""Data unlearning for diffusers: make a diffusion model forget training images and keep everything else."""

from siss_diffusers.combine import Products, Rule, scaling_rule
from siss_diffusers.gradients import PairedGradients, StepStats
from siss_diffusers.methods import METHODS, Method, Query, Rows, make_method
from siss_diffusers.noising import GaussianPath
from siss_diffusers.weights import importance_weights, log_density_ratio


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "GaussianPath",
    "Method",
    "PairedGradients",
    "Products",
    "Query",
    "Rows",
    "Rule",
    "StepStats",
    "importance_weights",
    "log_density_ratio",
    "make_method",
    "scaling_rule",
]

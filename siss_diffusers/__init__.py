"""Data unlearning for diffusers: make a diffusion model forget training images and keep everything else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from siss_diffusers.api import unlearn as unlearn
    from siss_diffusers.combine import Products as Products
    from siss_diffusers.combine import Rule as Rule
    from siss_diffusers.combine import scaling_rule as scaling_rule
    from siss_diffusers.gradients import PairedGradients as PairedGradients
    from siss_diffusers.gradients import StepStats as StepStats
    from siss_diffusers.methods import METHODS as METHODS
    from siss_diffusers.methods import Method as Method
    from siss_diffusers.methods import Query as Query
    from siss_diffusers.methods import Rows as Rows
    from siss_diffusers.methods import make_method as make_method
    from siss_diffusers.noising import GaussianPath as GaussianPath
    from siss_diffusers.outcome import Outcome as Outcome
    from siss_diffusers.settings import Settings as Settings
    from siss_diffusers.settings import TextToImageSettings as TextToImageSettings
    from siss_diffusers.settings import UnconditionalSettings as UnconditionalSettings
    from siss_diffusers.weights import importance_weights as importance_weights
    from siss_diffusers.weights import log_density_ratio as log_density_ratio


__version__ = "0.1.0"

# Where each public name is defined. A name must not be that of a module of this package: importing the module would
# replace it.
_LOCATIONS = {
    "METHODS": "siss_diffusers.methods",
    "GaussianPath": "siss_diffusers.noising",
    "Method": "siss_diffusers.methods",
    "Outcome": "siss_diffusers.outcome",
    "PairedGradients": "siss_diffusers.gradients",
    "Products": "siss_diffusers.combine",
    "Query": "siss_diffusers.methods",
    "Rows": "siss_diffusers.methods",
    "Rule": "siss_diffusers.combine",
    "Settings": "siss_diffusers.settings",
    "StepStats": "siss_diffusers.gradients",
    "TextToImageSettings": "siss_diffusers.settings",
    "UnconditionalSettings": "siss_diffusers.settings",
    "importance_weights": "siss_diffusers.weights",
    "log_density_ratio": "siss_diffusers.weights",
    "make_method": "siss_diffusers.methods",
    "scaling_rule": "siss_diffusers.combine",
    "unlearn": "siss_diffusers.api",
}

__all__ = [*_LOCATIONS]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package loads no library."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LOCATIONS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

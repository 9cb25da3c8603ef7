"""Measures models beside each other, on the same seeds: for `siss evaluate`, the Python API, demos and benchmarks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from siss_diffusers.evaluation.data import EvaluationData as EvaluationData
    from siss_diffusers.evaluation.data import SplitData as SplitData
    from siss_diffusers.evaluation.data import collect_data as collect_data
    from siss_diffusers.evaluation.data import split_to_measure as split_to_measure
    from siss_diffusers.evaluation.evaluator import Evaluation as Evaluation
    from siss_diffusers.evaluation.evaluator import Evaluator as Evaluator
    from siss_diffusers.evaluation.evaluator import evaluate as evaluate
    from siss_diffusers.evaluation.evaluator import measure as measure
    from siss_diffusers.evaluation.model import MeasuredModel as MeasuredModel
    from siss_diffusers.evaluation.networks import Networks as Networks
    from siss_diffusers.evaluation.networks import load_networks as load_networks
    from siss_diffusers.evaluation.output import write_evaluation as write_evaluation
    from siss_diffusers.evaluation.settings import EvaluationSettings as EvaluationSettings
    from siss_diffusers.evaluation.summary import format_summary as format_summary

# Where each name is defined.
_LOCATIONS = {
    "Evaluation": "siss_diffusers.evaluation.evaluator",
    "EvaluationData": "siss_diffusers.evaluation.data",
    "EvaluationSettings": "siss_diffusers.evaluation.settings",
    "Evaluator": "siss_diffusers.evaluation.evaluator",
    "MeasuredModel": "siss_diffusers.evaluation.model",
    "Networks": "siss_diffusers.evaluation.networks",
    "SplitData": "siss_diffusers.evaluation.data",
    "collect_data": "siss_diffusers.evaluation.data",
    "evaluate": "siss_diffusers.evaluation.evaluator",
    "format_summary": "siss_diffusers.evaluation.summary",
    "load_networks": "siss_diffusers.evaluation.networks",
    "measure": "siss_diffusers.evaluation.evaluator",
    "split_to_measure": "siss_diffusers.evaluation.data",
    "write_evaluation": "siss_diffusers.evaluation.output",
}

__all__ = [*_LOCATIONS]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the flags of `siss evaluate` need the settings alone."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LOCATIONS[name]), name)
    globals()[name] = value
    return value

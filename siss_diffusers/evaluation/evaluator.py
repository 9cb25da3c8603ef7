"""Measures models beside each other: the base first, then whatever is compared with it."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import isfinite
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.evaluation.data import EvaluationData, SplitData, collect_data, load_never_seen
from siss_diffusers.evaluation.detectors import Detectors
from siss_diffusers.evaluation.model import MeasuredModel
from siss_diffusers.evaluation.networks import Networks, load_networks, refuse_dead_networks
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.families import Family
from siss_diffusers.families.prompts import warn_of_long_prompts
from siss_diffusers.families.sampling import evaluating
from siss_diffusers.metrics import METRICS, PROBES, Entry, Skip


logger = logging.getLogger(__name__)

NUM_SHOWN = 16  # images to forget, and to keep, that show whether a network can tell pictures apart


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Args:
        results: the figures of each model, as in `evaluation.json`. A figure that could not be measured is None.
        samples: pictures `(N, C, H, W)` in [0, 1] of each model, by kind.
        settings: how it was measured; `skipped` holds the reason of each figure that could not be measured.
        detectors: what flagged copies.
    """

    results: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]
    detectors: Detectors

    @property
    def content(self) -> dict[str, Any]:
        """The content of `evaluation.json`."""
        return self.results | {"settings": self.settings}


class Evaluator:
    """Everything that does not depend on the model, prepared once.

    Args:
        family: of all models.
        data: pictures and prompts.
        networks: what looks at pictures; None loads those that the settings name.

    Raises:
        UsageError: for a network that cannot be loaded, does not take the pictures, or cannot tell them apart.
    """

    def __init__(
        self,
        family: Family,
        data: EvaluationData,
        settings: EvaluationSettings | None = None,
        networks: Networks | None = None,
    ) -> None:
        self.family, self.data = family, data
        self.settings = settings or EvaluationSettings()
        self.networks = load_networks(self.settings, PartialState().device) if networks is None else networks
        refuse_dead_networks(self.networks, torch.cat([data.forget[:NUM_SHOWN], data.keep[:NUM_SHOWN]]))
        self.detectors = Detectors(data.forget, data.keep, self.networks.copy_features)

    def model(self, name: str, pipeline: Any, base: MeasuredModel | None = None, **changes: Any) -> MeasuredModel:
        """Return a model to measure.

        Args:
            base: the model that it is compared with.
            changes: settings that are different for this model.
        """
        return MeasuredModel(
            name=name,
            pipeline=pipeline,
            family=self.family,
            data=self.data,
            settings=replace(self.settings, **changes),
            detectors=self.detectors,
            networks=self.networks,
            base=base,
        )

    def evaluate(self, models: Mapping[str, Callable[[], Any]]) -> Evaluation:
        """Measure models on the same seeds.

        Args:
            models: functions that load the pipelines, by name; the first is the base. One pipeline is loaded at a
                time. With `relearning_steps` an evaluation trains every pipeline but the base's, so a pipeline that is
                needed afterwards must be loaded anew.
        """
        started = time.perf_counter()
        results: dict[str, dict[str, Any]] = {}
        samples: dict[str, dict[str, Tensor]] = {}
        skipped = {f"copies by {detector}": reason for detector, reason in self.detectors.blind.items()}
        base = None
        for name, load in models.items():
            model = self.model(name, load(), base)
            if base is None:
                self.warn_of_long_prompts(model.pipeline)
                skipped |= self.add_clusters(model)
            samples[name] = model.samples_by_kind()
            results[name], reasons = measure(model)
            skipped |= reasons
            model.release()
            base = base or model
        for figures in results.values():
            # A metric that could not be measured is null, with its reason.
            keys = [key for key in skipped if key in METRICS or key in PROBES]
            figures |= {key: None for key in keys if key not in figures}
        settings = self.describe() | {"seconds": time.perf_counter() - started, "skipped": skipped}
        return Evaluation(results, samples, settings, self.detectors)

    def add_clusters(self, base: MeasuredModel) -> dict[str, str]:
        """Make a copy detector of the base's samples; return the reason if it cannot be used."""
        if not self.settings.use_clusters:
            return {}
        reason = self.detectors.add_clusters(base.samples, self.settings.seed)
        return {} if reason is None else {"copies by cluster": reason}

    def warn_of_long_prompts(self, pipeline: Any) -> None:
        """Warn of prompts that are cut off."""
        if self.family.has_prompts:
            prompts = [*self.data.prompts, *self.data.ordinary_prompts, *self.settings.paraphrases]
            warn_of_long_prompts(self.family, pipeline, prompts)

    def describe(self) -> dict[str, Any]:
        """Return how models are measured, for `settings` of `evaluation.json`."""
        settings = self.settings
        return {
            "detectors": self.detectors.settings,
            "damage_table": self.detectors.damage_table(settings.seed),
            "keep_flagged": self.detectors.keep_flagged(),
            "forget_images": len(self.data.forget),
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale if self.family.has_prompts else None,
            "seed": settings.seed,
            "relearning_rate": settings.relearning_rate if settings.relearning_steps else None,
            "versions": {name: version(name) for name in ("torch", "diffusers", "siss_diffusers")},
        }


def measure(model: MeasuredModel, entries: Iterable[Entry] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure a model; entries that change it come last.

    Args:
        entries: what to measure; None is every metric and every probe.

    Returns:
        The figures, and the reason of each that could not be measured.
    """
    entries = [*METRICS.values(), *PROBES.values()] if entries is None else list(entries)
    figures: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    with evaluating(model.network):
        for entry in sorted(entries, key=lambda entry: entry.changes_model):
            try:
                figures |= entry.measure(model)
            except Skip as skip:
                reasons[entry.key] = str(skip)
            except UsageError:
                raise
            except (RuntimeError, ValueError, ArithmeticError) as error:
                # One figure less, not all of them. Other processes would wait for this one.
                if PartialState().num_processes > 1:
                    raise
                logger.warning(f"{entry.label} could not be measured ({describe_error(error)})")
                reasons[entry.key] = f"it failed ({type(error).__name__})"
    for key, value in figures.items():
        if isinstance(value, float) and not isfinite(value):
            reasons.setdefault(key, "the result is not a finite number")
    return only_finite(figures), reasons


def only_finite(value: Any) -> Any:
    """Return a copy of a JSON value with None in place of numbers that are not finite, however deep."""
    if isinstance(value, dict):
        return {key: only_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [only_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def evaluate(
    family: Family,
    models: Mapping[str, Callable[[], Any]],
    split: SplitData,
    settings: EvaluationSettings | None = None,
) -> Evaluation:
    """Measure models on the same seeds.

    Args:
        family: of all models.
        models: functions that load the pipelines, by name; the first is the base. See `Evaluator.evaluate`.
        split: from `split_to_measure`.

    Raises:
        UsageError: for networks, images or settings that cannot be used, before any model is loaded.
    """
    settings = settings or EvaluationSettings()
    networks = load_networks(settings, PartialState().device)
    data = collect_data(
        split.keep,
        split.forget,
        split.keep_prompts,
        split.forget_prompts,
        num_samples=settings.num_samples,
        with_ordinary_images=networks.features is not None,
        seed=settings.seed,
    )
    if "other" in settings.attack_starts and not data.ordinary_prompts:
        raise UsageError("--attack_starts other: the training set has no other prompt to start from; drop `other`")
    if settings.never_seen_dir is not None:
        data = replace(data, never_seen=load_never_seen(settings, family))
    evaluation = Evaluator(family, data, settings, networks).evaluate(models)
    evaluation.settings["data"] = split.counts
    return evaluation

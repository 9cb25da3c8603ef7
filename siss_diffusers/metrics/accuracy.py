"""Whether samples show what their prompts ask for, as a classifier sees it."""

from typing import TYPE_CHECKING

import torch

from siss_diffusers.metrics.base import Metric, Skip
from siss_diffusers.metrics.broken import finite
from siss_diffusers.metrics.formats import percent


if TYPE_CHECKING:
    from siss_diffusers.evaluation.model import MeasuredModel


def _classifier_accuracy(model: "MeasuredModel") -> dict[str, float]:
    classes, prompts = model.data.prompt_classes, model.data.ordinary_prompts
    if not any(prompt in classes for prompt in prompts):
        raise Skip("no prompt names a class to check")
    if model.networks.class_probabilities is None:
        raise Skip("needs --classifier, a TorchScript file")
    samples = model.ordinary_samples
    # The prompts took turns. -1: the prompt names no class.
    asked = torch.tensor([classes.get(prompts[index % len(prompts)], -1) for index in range(len(samples))])
    seen = torch.full((len(samples),), -2)  # a picture that is not finite shows nothing that was asked for
    if (measured := finite(samples)).any():
        seen[measured] = model.networks.class_probabilities(samples[measured]).argmax(1)
    return {"classifier_accuracy": (seen == asked)[asked >= 0].float().mean().item()}


CLASSIFIER_ACCURACY = Metric(
    key="classifier_accuracy",
    label="Classifier accuracy",
    explanation="Share of the samples in which a classifier sees what the prompt asks for. Higher is better.",
    measure=_classifier_accuracy,
    format=percent,
    better="higher",
    chapter="rest",
)

import pytest
import torch

from siss_diffusers.evaluation import Networks
from siss_diffusers.metrics import METRICS, Skip
from tests.helpers.evaluating import flowers_evaluator


ACCURACY = METRICS["classifier_accuracy"].measure


def always_one(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[0.2, 0.8, 0.0]]).expand(len(images), -1)


def measured(classes: dict[str, int], prompts: tuple[str, ...], count: int) -> dict:
    evaluator = flowers_evaluator(Networks(class_probabilities=always_one), ordinary=prompts)
    evaluator.data.prompt_classes.clear()
    evaluator.data.prompt_classes.update(classes)
    model = evaluator.model("x", pipeline=None)
    model.ordinary_samples = torch.zeros(count, 3, 32, 32)
    return ACCURACY(model)


def test_prompts_took_turns_and_those_without_a_class_do_not_count():
    assert measured({"a": 0, "b": 1}, ("a", "b", "c"), 8) == {"classifier_accuracy": 0.5}
    assert measured({"a": 0, "b": 1}, ("a", "b"), 5) == {"classifier_accuracy": pytest.approx(2 / 5)}
    assert measured({"b": 1}, ("a", "b"), 5) == {"classifier_accuracy": 1.0}
    assert measured({"a": 0, "b": 1}, ("b", "a", "c"), 4) == {"classifier_accuracy": pytest.approx(2 / 3)}


def test_without_a_class_or_a_classifier_there_is_none():
    with pytest.raises(Skip, match="names a class"):
        measured({"other": 1}, ("a", "b"), 4)
    evaluator = flowers_evaluator(Networks())
    with pytest.raises(Skip, match="--classifier"):
        ACCURACY(evaluator.model("x", pipeline=None))

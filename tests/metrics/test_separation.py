import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from siss_diffusers.metrics.separation import auc_interval, separation


@pytest.mark.parametrize("shift", [0.0, 0.7, 3.0, 20.0])
@pytest.mark.parametrize("numbers", [(5, 3), (40, 300), (112, 1000)])
@pytest.mark.parametrize("rounded", [False, True])
def test_figures_are_those_of_scikit_learn(shift, numbers, rounded):
    generator = np.random.default_rng(0)
    positives, negatives = generator.normal(shift, 1, numbers[0]), generator.normal(0, 1, numbers[1])
    if rounded:  # so that scores are equal
        positives, negatives = positives.round(), negatives.round()
    labels = np.repeat([1, 0], numbers)
    scores = np.concatenate([positives, negatives])
    found = separation(positives, negatives)
    assert found.auc == pytest.approx(roc_auc_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.tpr == pytest.approx(true[false <= 0.01].max())
    assert found.auc_low <= found.auc <= found.auc_high and found.tpr_low <= found.tpr <= found.tpr_high


def test_the_interval_holds_the_true_auc_as_often_as_it_says():
    generator, inside = np.random.default_rng(1), 0
    for _ in range(400):
        found = separation(generator.normal(1.5, 1, 30), generator.normal(0, 1, 40))
        inside += found.auc_low <= 0.8556 <= found.auc_high  # Phi(1.5 / sqrt(2))
    assert 0.92 <= inside / 400 <= 0.98


def test_few_prompts_prove_little_even_without_an_error():
    low, high = auc_interval(1.0, 4, 4)
    assert low < 0.75 and high == 1.0
    assert auc_interval(1.0, 500, 500)[0] > 0.99

import math

import pytest
import torch

from siss_diffusers.metrics.inception_score import inception_score


def test_known_confusion():
    """Ten classes in equal parts, each read rightly with probability 1 - e: exp(log 10 - entropy of a row)."""
    error = 0.1
    row = torch.full((10, 10), error / 9)
    row.fill_diagonal_(1 - error)
    entropy = -(1 - error) * math.log(1 - error) - error * math.log(error / 9)
    score, spread = inception_score(row.repeat(40, 1))
    assert score == pytest.approx(10 * math.exp(-entropy), rel=1e-6) and spread == pytest.approx(0, abs=1e-6)


def test_extremes():
    assert inception_score(torch.eye(10).repeat(10, 1))[0] == pytest.approx(10)
    assert inception_score(torch.full((100, 10), 0.1))[0] == pytest.approx(1)

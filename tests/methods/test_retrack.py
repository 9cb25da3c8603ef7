import pytest
import torch

from siss_diffusers import make_method
from siss_diffusers.methods import ReTrack
from tests.helpers.equations import (
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere,
    assert_gradient_is_that_of_the_equations,
    keep_alone,
)
from tests.helpers.tiny_problem import PATHS


LAM = 0.4


def losses(terms):
    neighbors = terms.query.neighbors.double().unbind(1)
    noises = [(terms.a_t - terms.alpha * y) / terms.sigma for y in neighbors]
    posterior = torch.stack([-noise.square().sum((1, 2, 3)) / 2 for noise in noises]).softmax(0)
    redirected = sum(
        terms.loss(p, terms.a_t, terms.target(y, noise))
        for p, y, noise in zip(posterior, neighbors, noises, strict=True)
    )
    return (1 - LAM) * terms.loss_of_x() + LAM * redirected, terms.nothing


@pytest.mark.parametrize("prediction_type", PATHS)
def test_gradient_is_that_of_the_equations(prediction_type):
    assert_gradient_is_that_of_the_equations(ReTrack(lam=LAM), losses, keep_alone, prediction_type)


def test_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere():
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(ReTrack(lam=LAM), losses, keep_alone)


@pytest.mark.parametrize(
    ("args", "message"),
    [(["num_neighbors=2.5"], "must be of type int"), (["num_neighbors=0"], "at least 1")],
)
def test_bad_arguments_are_refused_in_a_sentence(args, message):
    with pytest.raises(ValueError, match=message):
        make_method("retrack", args)


def test_arguments_are_parsed_by_type():
    method = make_method("retrack", ["lam=0.5", "num_neighbors=3"])
    assert (method.lam, method.num_neighbors) == (0.5, 3)

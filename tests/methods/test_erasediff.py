import pytest

from siss_diffusers import make_method
from siss_diffusers.methods import EraseDiff
from tests.helpers.equations import (
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere,
    assert_gradient_is_that_of_the_equations,
)
from tests.helpers.tiny_problem import PATHS


ETAS = [1e-3, 5.0]  # the second is far above the product, so that the maximum is not 0


def losses(terms):
    return terms.loss_of_x(), terms.loss(1, terms.a_t, terms.query.uniform.double())


def descended(eta):
    def combine(g_keep, g_forget):
        return g_keep + max(eta - (g_keep @ g_forget / g_forget.norm() ** 2).item(), 0) * g_forget

    return combine


@pytest.mark.parametrize("prediction_type", PATHS)
@pytest.mark.parametrize("eta", ETAS)
def test_gradient_is_that_of_the_equations(eta, prediction_type):
    assert_gradient_is_that_of_the_equations(EraseDiff(eta), losses, descended(eta), prediction_type)


@pytest.mark.parametrize("eta", ETAS)
def test_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(eta):
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(EraseDiff(eta), losses, descended(eta))


def test_bad_arguments_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="eta must be"):
        make_method("erasediff", ["eta=-1"])

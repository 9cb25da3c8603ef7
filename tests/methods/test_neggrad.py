import pytest

from siss_diffusers import make_method
from siss_diffusers.methods import NegGrad
from tests.helpers.equations import assert_gradient_is_that_of_the_equations
from tests.helpers.tiny_problem import PATHS


@pytest.mark.parametrize("prediction_type", PATHS)
def test_gradient_is_that_of_the_equations(prediction_type):
    def losses(terms):
        return terms.nothing, terms.loss_of_a()

    def ascended(g_keep, g_forget):
        return -0.7 * g_forget

    assert_gradient_is_that_of_the_equations(NegGrad(scale=0.7), losses, ascended, prediction_type)


def test_bad_arguments_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="scale must be"):
        make_method("neggrad", ["scale=inf"])

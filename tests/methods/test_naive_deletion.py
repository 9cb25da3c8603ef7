import pytest

from siss_diffusers.methods import NaiveDeletion
from tests.helpers.equations import assert_gradient_is_that_of_the_equations, keep_alone
from tests.helpers.tiny_problem import PATHS


@pytest.mark.parametrize("prediction_type", PATHS)
def test_gradient_is_that_of_the_equations(prediction_type):
    def losses(terms):
        return terms.loss_of_x(), terms.nothing

    assert_gradient_is_that_of_the_equations(NaiveDeletion(), losses, keep_alone, prediction_type)

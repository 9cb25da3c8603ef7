"""SISS, its form without importance sampling, and subscores by a coin."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from siss_diffusers import METHODS, make_method
from siss_diffusers.methods import SISS
from tests.helpers.equations import (
    SCALINGS,
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere,
    assert_gradient_is_that_of_the_equations,
    subtracted,
)
from tests.helpers.tiny_problem import PATHS, draw_query


LAM = 0.3


def siss(terms):
    log_x, log_a = (
        Normal(terms.alpha * mean, terms.sigma).log_prob(terms.m).sum((1, 2, 3)) for mean in (terms.x, terms.a)
    )
    log_mixture = torch.logaddexp(math.log(1 - LAM) + log_x, math.log(LAM) + log_a)
    return tuple(
        terms.loss(
            (log_q - log_mixture).exp(), terms.m, terms.target(mean, (terms.m - terms.alpha * mean) / terms.sigma)
        )
        for log_q, mean in ((log_x, terms.x), (log_a, terms.a))
    )


def siss_no_is(terms):
    return terms.loss_of_x(), terms.loss_of_a()


def subscore_bernoulli(terms):
    from_forget = terms.query.from_forget
    in_keep = 1 - from_forget.double()
    wanted = torch.where(
        from_forget[:, None, None, None], terms.target(terms.a, terms.eps), terms.target(terms.x, terms.eps)
    )
    return terms.loss(in_keep / (1 - LAM), terms.m, wanted), terms.loss((1 - in_keep) / LAM, terms.m, wanted)


LOSSES = {"siss": siss, "siss_no_is": siss_no_is, "subscore_bernoulli": subscore_bernoulli}


def build(name):
    return METHODS[name](**{} if name == "siss_no_is" else {"lam": LAM})


@pytest.mark.parametrize("prediction_type", PATHS)
@pytest.mark.parametrize(("scaling", "scale"), SCALINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_equations(name, scaling, scale, prediction_type):
    assert_gradient_is_that_of_the_equations(
        build(name), LOSSES[name], subtracted(scaling, scale), prediction_type, scaling, scale
    )


@pytest.mark.parametrize(("scaling", "scale"), SCALINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(name, scaling, scale):
    assert_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(
        build(name), LOSSES[name], subtracted(scaling, scale), scaling, scale
    )


def test_the_problem_has_rows_of_every_kind():
    """Otherwise the tests of the equations would not reach every branch of the engine."""
    rows = SISS(lam=0.3).rows(draw_query())
    kinds = {(keep > 0, forget > 0) for keep, forget in zip(rows.keep_weight.tolist(), rows.forget_weight.tolist())}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_unequal_prompts_give_exactly_one_hot_weights():
    lam, same = 0.3, torch.arange(12) % 2 == 0
    query = draw_query(distances=(1e-3,))  # so near that equal prompts give weights near 1
    conditions = {"keep_condition": torch.arange(12), "forget_condition": torch.arange(12) + (~same).long()}
    plain, joint = SISS(lam).rows(query), SISS(lam).rows(replace(query, **conditions))
    assert joint.condition.equal(torch.where(query.from_forget, *reversed(conditions.values())))
    from_forget = query.from_forget[~same]
    assert joint.keep_weight[~same].equal(torch.where(from_forget, 0.0, 1 / (1 - lam)))
    assert joint.forget_weight[~same].equal(torch.where(from_forget, 1 / lam, 0.0))
    assert joint.keep_weight[same].equal(plain.keep_weight[same])
    assert joint.forget_weight[same].equal(plain.forget_weight[same])
    torch.testing.assert_close(plain.keep_weight, torch.ones(12), atol=0.05, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("same", [True, False])
def test_lambda_at_its_ends_is_one_component(lam, same):
    query = draw_query(from_forget=torch.full((12,), lam == 1))
    conditions = {"keep_condition": torch.zeros(12).long(), "forget_condition": torch.full((12,), int(not same))}
    rows = SISS(lam).rows(replace(query, **conditions))
    own, other = (rows.keep_weight, rows.forget_weight) if lam == 0 else (rows.forget_weight, rows.keep_weight)
    assert (own == 1).all()
    assert other.isfinite().all() and (other > 0).any() == same


def test_negligible_weights_are_zero():
    rows = SISS(lam=0.5).rows(draw_query(batch=400))
    for weight in (rows.keep_weight, rows.forget_weight):
        assert ((weight == 0) | (weight >= 1e-6)).all() and (weight == 0).any()
    assert (rows.reweighted(torch.full((400,), 1e-8)).keep_weight == 0).all()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("siss", ["lambda=0.5"], r"no argument 'lambda=0.5'; its arguments and defaults: lam=0.5"),
        ("siss", ["lam"], "no argument 'lam'"),
        ("siss_no_is", ["lam=0.5"], "arguments and defaults: none"),
        ("siss", ["lam=half"], "must be of type float"),
        ("siss", ["lam=nan"], r"lam must lie in \[0, 1\]"),
        ("subscore_bernoulli", ["lam=1"], "strictly between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(name, args, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, args)

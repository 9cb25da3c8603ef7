"""What every method has to keep to; the equations of each are written out in a file of its own."""

from dataclasses import replace

import pytest
import torch

from siss_diffusers import METHODS, PairedGradients, make_method, scaling_rule
from tests.helpers.tiny_problem import TinyNet, draw_query, predictor


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].has_both_sides])
def test_rows_outside_the_range_of_forgetting(name):
    query = replace(draw_query(), keep_condition=torch.arange(12), forget_condition=torch.arange(12) + 100)
    method = METHODS[name]()
    outside = METHODS["naive_deletion"]().rows(query)
    for low, high in ((300, 700), (0, 1)):  # in the second is no pair
        rows = method.rows_within(query, (low, high))
        within = (query.timesteps >= low) & (query.timesteps < high)
        assert rows.num_pairs == 12 and rows.timesteps.equal(query.timesteps[rows.pair])
        ordinary = rows[~within[rows.pair]]
        assert sorted(ordinary.pair.tolist()) == (~within).nonzero().flatten().tolist()
        assert not ordinary.from_forget.any() and not ordinary.forget_weight.any()
        assert (ordinary.keep_weight == 1).all() and ordinary.condition.equal(ordinary.pair)
        assert ordinary.noisy.equal(outside.noisy[ordinary.pair])
        assert ordinary.keep_target.equal(outside.keep_target[ordinary.pair])
        assert len(rows) == (len(method.rows(query)) // 12) * within.sum() + (~within).sum()
    whole, plain = method.rows_within(query, (0, 1000)), method.rows(query)
    assert whole.noisy.equal(plain.noisy) and whole.pair.equal(plain.pair)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_images_are_subtracted_in_float32(name):
    """At t = 0, r = alpha / sigma is 100: a difference rounded to bf16 would put errors of 0.1 into the targets."""
    query = draw_query(timesteps=torch.zeros(12, dtype=torch.long))
    half = {name: getattr(query, name).bfloat16() for name in ("keep", "forget", "noise", "neighbors")}
    found = METHODS[name]().rows(replace(query, **half))
    expected = METHODS[name]().rows(replace(query, **{name: value.float() for name, value in half.items()}))
    for side in ("keep_target", "forget_target"):
        target, of_floats = getattr(found, side), getattr(expected, side)
        assert target is of_floats is None or target.dtype == torch.float32 and target.equal(of_floats)


@pytest.mark.parametrize("name", METHODS)
def test_no_forward_is_spent_on_a_row_of_weight_zero(name):
    method = METHODS[name]()
    rows = method.rows(draw_query(batch=40))
    for scaling, scale in (("relative", 0.1), ("norm", 1.0), ("fixed", 0.1)):
        seen, net = [], TinyNet()

        def predict(group, seen=seen, net=net):
            seen.append(group)
            return predictor(net)(group)

        gradients = PairedGradients(net.parameters(), method.rule(scaling_rule(scaling, scale)))
        gradients.compute([rows], predict)
        assert all(((group.keep_weight > 0) | (group.forget_weight > 0)).all() for group in seen)
        serving = (rows.keep_weight > 0).long() + (rows.forget_weight > 0).long()
        forwards = sum(len(group) for group in seen)
        # A row that serves both sides runs twice where the forget gradient comes first, or where few such rows are.
        twice = gradients.mode == "forget_first" or (
            gradients.mode == "paired" and (serving == 2).sum() <= len(rows) / 8
        )
        assert forwards == (serving if twice else serving.clamp(max=1)).sum()


def test_an_unknown_method_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="unknown method 'sis': one of naive_deletion, neggrad, siss"):
        make_method("sis", [])

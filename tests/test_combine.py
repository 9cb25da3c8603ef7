import math

import pytest
import torch

from siss_diffusers.combine import FORGET_SCALINGS, Products, erasediff, scaling_rule


SCALES = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None, "project": 0.3}


def products_of(keep: torch.Tensor, forget: torch.Tensor) -> Products:
    return Products((keep @ keep).item(), (keep @ forget).item(), (forget @ forget).item())


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))


def test_the_forget_term_has_the_promised_size():
    keep, forget = draw()
    products = products_of(keep, forget)
    _, relative = scaling_rule("relative", 0.3)(products)
    assert -relative * forget.norm() == pytest.approx(0.3 * keep.norm())
    _, norm = scaling_rule("norm", 5.0)(products)
    assert -norm * forget.norm() == pytest.approx(5.0)
    assert scaling_rule("fixed", 0.2)(products) == (1.0, -0.2)


def test_nash_equals_the_bargaining_equations():
    """(c_k, c_f) solves G c = 1/c for the Gram matrix of the descent directions g_k and -g_f (Nash's condition)."""
    for seed in range(5):
        keep, forget = draw(seed)
        c_keep, c_forget = scaling_rule("nash")(products_of(keep, forget))
        directions, c = torch.stack([keep, -forget]), torch.tensor([c_keep, -c_forget], dtype=torch.float64)
        torch.testing.assert_close(directions @ directions.T @ c, 1 / c)


def test_nash_without_a_bargain_is_naive_deletion():
    keep, _ = draw()
    assert scaling_rule("nash")(products_of(keep, 2 * keep)) == (1.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("along", [-0.5, 0.5])
def test_project_takes_nothing_from_the_keep_direction(seed, along):
    """The step descends the keep loss at least as fast as the keep gradient, and goes as far up the rest of the other."""
    keep, forget = draw(seed)
    forget = forget + along * keep
    c_keep, c_forget = scaling_rule("project", 0.3)(products_of(keep, forget))
    step = c_keep * keep + c_forget * forget
    unit = keep / keep.norm()
    conflicts = keep @ forget > 0
    expected = keep.norm() if conflicts else keep.norm() - 0.3 * keep.norm() / forget.norm() * (forget @ unit)
    assert step @ unit == pytest.approx(expected)
    across = forget - (forget @ unit) * unit
    torch.testing.assert_close(step - (step @ unit) * unit, -0.3 * keep.norm() / forget.norm() * across)


def test_erasediff():
    keep, forget = draw()
    products = products_of(keep, forget)
    expected = max(0.5 - (keep @ forget / (forget @ forget)).item(), 0)
    assert erasediff(products, 0.5) == (1.0, pytest.approx(expected))
    assert erasediff(products_of(forget, forget), 0.5) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["relative", "norm", "nash", "project"])
@pytest.mark.parametrize("products", [Products(0.0, 0.0, 1.0), Products(1.0, 0.0, 0.0), Products(0.0, 0.0, 0.0)])
def test_a_zero_norm_means_the_keep_gradient_alone(name, products):
    assert scaling_rule(name, SCALES[name])(products) == (1.0, 0.0)
    assert erasediff(Products(1.0, 0.0, 0.0), 0.1) == (1.0, 0.0)


def test_defaults_and_refusals():
    products = Products(4.0, 0.0, 1.0)
    assert scaling_rule()(products) == (1.0, -0.2)
    assert scaling_rule("fixed")(products) == (1.0, -0.1)
    for name, scale, message in [
        ("cubic", None, "one of relative"),
        ("norm", None, "needs a scale"),
        ("nash", 1.0, "takes no scale"),
        ("fixed", -1.0, "not below 0"),
        ("relative", math.nan, "not below 0"),
        ("relative", math.inf, "not below 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaling_rule(name, scale)


def test_what_a_rule_needs_decides_its_cost():
    assert [scaling_rule(name, SCALES[name]).needs for name in FORGET_SCALINGS] == [
        "products",
        "forget_norm",
        "nothing",
        "products",
        "products",
    ]

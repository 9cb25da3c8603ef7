"""Every method, through the gradient engine, against the equations written out in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, make_method, scaling_rule
from siss_diffusers.draws import mixture_components
from siss_diffusers.methods import SISS
from tests.helpers.tiny_problem import (
    PATHS,
    TinyNet,
    draw_query,
    engine_gradient,
    micro_batches,
    predictor,
    relative_error,
    trainable,
)


def spread(value):
    return value[:, None, None, None]


def target_of(prediction_type, sample, noise, alpha, sigma):
    return {
        "epsilon": noise,
        "sample": sample,
        "v_prediction": alpha * noise - sigma * sample,
        "flow_prediction": noise - sample,
    }[prediction_type]


def reference_losses(net, query, name, args):
    """(L_keep, L_forget) of section 3 of the design, summed over pixels, averaged over pairs."""
    alpha, sigma = (
        spread(query.path.alphas[query.timesteps].double()),
        spread(query.path.sigmas[query.timesteps].double()),
    )
    x, a, eps = query.keep.double(), query.forget.double(), query.noise.double()
    from_forget = spread(query.from_forget)

    def target(sample, noise):
        return target_of(query.path.prediction_type, sample, noise, alpha, sigma)

    def loss(weight, noisy, wanted):
        error = (net(noisy, query.timesteps) - wanted).square().sum((1, 2, 3))
        weight = torch.as_tensor(weight, dtype=torch.float64)
        return (torch.where(weight < 1e-6, 0.0, weight) * error).mean()

    x_t, a_t, nothing = alpha * x + sigma * eps, alpha * a + sigma * eps, torch.zeros(())
    if name == "naive_deletion":
        return loss(1, x_t, target(x, eps)), nothing
    if name == "neggrad":
        return nothing, loss(1, a_t, target(a, eps))
    if name == "siss_no_is":
        return loss(1, x_t, target(x, eps)), loss(1, a_t, target(a, eps))
    if name == "erasediff":
        return loss(1, x_t, target(x, eps)), loss(1, a_t, query.uniform.double())
    lam = args["lam"]
    m = torch.where(from_forget, a_t, x_t)
    if name == "subscore_bernoulli":
        in_keep = 1 - query.from_forget.double()
        wanted = torch.where(from_forget, target(a, eps), target(x, eps))
        return loss(in_keep / (1 - lam), m, wanted), loss((1 - in_keep) / lam, m, wanted)
    if name == "siss":
        log_x, log_a = (Normal(alpha * mean, sigma).log_prob(m).sum((1, 2, 3)) for mean in (x, a))
        log_mixture = torch.logaddexp(math.log(1 - lam) + log_x, math.log(lam) + log_a)
        return (
            loss((log_x - log_mixture).exp(), m, target(x, (m - alpha * x) / sigma)),
            loss((log_a - log_mixture).exp(), m, target(a, (m - alpha * a) / sigma)),
        )
    assert name == "retrack"
    noises = [(a_t - alpha * y) / sigma for y in query.neighbors.double().unbind(1)]
    posterior = torch.stack([-noise.square().sum((1, 2, 3)) / 2 for noise in noises]).softmax(0)
    redirected = sum(
        loss(p, a_t, target(y, noise))
        for p, y, noise in zip(posterior, query.neighbors.double().unbind(1), noises, strict=True)
    )
    return (1 - lam) * loss(1, x_t, target(x, eps)) + lam * redirected, nothing


def reference_gradient(net, query, name, args, scaling, scale, forget_timestep_range=None):
    net = copy.deepcopy(net).double()

    def gradient_of(loss):
        grads = (
            torch.autograd.grad(loss, trainable(net))
            if loss.requires_grad
            else [torch.zeros_like(parameter) for parameter in trainable(net)]
        )
        return torch.cat([grad.flatten() for grad in grads])

    losses = reference_losses(net, query, name, args)
    if forget_timestep_range is not None:
        low, high = forget_timestep_range
        (inside,) = torch.where((low <= query.timesteps) & (query.timesteps < high))
        (outside,) = torch.where((low > query.timesteps) | (query.timesteps >= high))
        inner = reference_losses(net, query[inside], name, args)
        outer = reference_losses(net, query[outside], "naive_deletion", {})
        share = len(inside) / len(query.keep)
        losses = [share * inner + (1 - share) * outer for inner, outer in zip(inner, outer, strict=True)]
    g_keep, g_forget = (gradient_of(loss) for loss in losses)
    norm_keep, norm_forget = g_keep.norm(), g_forget.norm()
    if name in ("naive_deletion", "retrack"):
        return g_keep
    if name == "neggrad":
        return -args["scale"] * g_forget
    if name == "erasediff":
        return g_keep + max(args["eta"] - (g_keep @ g_forget / norm_forget**2).item(), 0) * g_forget
    if scaling == "nash":
        both = (1 - g_keep @ g_forget / (norm_keep * norm_forget)).sqrt()
        return (g_keep / norm_keep - g_forget / norm_forget) / both
    c = {"relative": scale * norm_keep / norm_forget, "norm": scale / norm_forget, "fixed": scale}[scaling]
    return g_keep - c * g_forget


OWN_RULE = [
    ("naive_deletion", {}, None, None),
    ("neggrad", {"scale": 0.7}, None, None),
    ("erasediff", {"eta": 1e-3}, None, None),
    ("erasediff", {"eta": 5.0}, None, None),  # far above the product, so that the maximum is not 0
    ("retrack", {"lam": 0.4}, None, None),
]
SCALED = [
    (name, {} if name == "siss_no_is" else {"lam": 0.3}, scaling, scale)
    for name in ("siss", "siss_no_is", "subscore_bernoulli")
    for scaling, scale in (("relative", 0.3), ("norm", 5.0), ("fixed", 0.2), ("nash", None))
]


@pytest.mark.parametrize("prediction_type", PATHS)
@pytest.mark.parametrize(("name", "args", "scaling", "scale"), OWN_RULE + SCALED)
def test_gradient_of_every_method_is_that_of_its_equations(name, args, scaling, scale, prediction_type):
    net, method = TinyNet(), METHODS[name](**args)
    query = draw_query(path=PATHS[prediction_type])
    rule = method.rule(scaling_rule(scaling, scale) if scaling else scaling_rule())
    window = [method.rows(part) for part in micro_batches(query, 5, 1, 6)]
    found, _ = engine_gradient(net, rule, window)
    tolerance = 2e-6 if scaling == "nash" else 1e-6  # two unit vectors are subtracted, and cancel in part
    assert relative_error(found, reference_gradient(net, query, name, args, scaling, scale)) < tolerance


BOTH_SIDES = [case for case in OWN_RULE + SCALED if METHODS[case[0]].has_both_sides]


@pytest.mark.parametrize(("name", "args", "scaling", "scale"), BOTH_SIDES)
def test_a_range_of_forgetting_leaves_ordinary_fine_tuning_elsewhere(name, args, scaling, scale):
    net, method, query, forget_range = TinyNet(), METHODS[name](**args), draw_query(batch=24), (300, 700)
    rule = method.rule(scaling_rule(scaling, scale) if scaling else scaling_rule())
    window = [method.rows_within(part, forget_range) for part in micro_batches(query, 9, 1, 14)]
    found, _ = engine_gradient(net, rule, window)
    expected = reference_gradient(net, query, name, args, scaling, scale, forget_range)
    assert relative_error(found, expected) < (2e-6 if scaling == "nash" else 1e-6)


@pytest.mark.parametrize("name", sorted({case[0] for case in BOTH_SIDES}))
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


def test_the_problem_has_rows_of_every_kind():
    """Otherwise the test above would not reach every branch of the engine."""
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


def test_half_precision_images_are_subtracted_in_float32():
    """At t = 0, r = alpha / sigma is 100: a difference rounded to bf16 would put errors of 0.1 into the targets."""
    query = draw_query(timesteps=torch.zeros(12, dtype=torch.long))
    half = {name: getattr(query, name).bfloat16() for name in ("keep", "forget", "noise", "neighbors")}
    for method in (SISS(), METHODS["retrack"](lam=0.5)):
        found = method.rows(replace(query, **half))
        expected = method.rows(replace(query, **{name: value.float() for name, value in half.items()}))
        assert found.keep_target.dtype == torch.float32 and found.keep_target.equal(expected.keep_target)


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


# Unbiasedness, by Monte Carlo on Gaussian images of two pixels and a fixed perceptron.

LOW = GaussianPath.from_scheduler(DDPMScheduler(num_train_timesteps=20, beta_start=0.02, beta_end=0.4))
NUM_KEEP, NUM_FORGET, DRAWS = 7, 3, 40_000


def low_dimensional_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_KEEP + NUM_FORGET, 1, 1, 2, generator=generator)


def row_gradients(rows):
    """Per-row gradients `(R, P)` of the keep and of the forget side for `W2 tanh(W1 [m, t])`, by hand."""
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(4, 3, generator=generator), torch.randn(2, 4, generator=generator)
    inputs = torch.cat([rows.noisy.flatten(1), rows.timesteps[:, None] / 20], 1)
    hidden = torch.tanh(inputs @ first.T)
    for target, weight in ((rows.keep_target, rows.keep_weight), (rows.forget_target, rows.forget_weight)):
        residual = 2 * weight[:, None] * (hidden @ second.T - (0 if target is None else target.flatten(1)))
        back = (residual @ second) * (1 - hidden**2)
        outer = [residual[:, :, None] * hidden[:, None, :], back[:, :, None] * inputs[:, None, :]]
        yield torch.cat([matrix.flatten(1) for matrix in outer], 1).double()


def monte_carlo(method, seed, keep_from, forget_from, lam=0.5):
    """`DRAWS` independent draws of the gradients, the images drawn uniformly from the index ranges."""
    generator, images = torch.Generator().manual_seed(seed), low_dimensional_images()
    choose = [torch.randint(*bounds, (DRAWS,), generator=generator) for bounds in (keep_from, forget_from)]
    query = Query(
        keep=images[choose[0]],
        forget=images[choose[1]],
        noise=torch.randn(DRAWS, 1, 1, 2, generator=generator),
        timesteps=torch.randint(20, (DRAWS,), generator=generator),
        from_forget=torch.from_numpy(mixture_components(seed, 0, DRAWS, lam).copy()),
        path=LOW,
    )
    return list(row_gradients(method.rows(query)))


def assert_same_mean(first, second):
    """Two-sided test of each of the 20 components at z = 4.5: with equal means, 1 chance in 7,000 of failing."""
    standard_error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    z = (first.mean(0) - second.mean(0)).abs() / standard_error
    assert z.max() < 4.5
    # The bound says something: the estimate is precise compared with the gradient itself.
    assert standard_error.norm() < 0.05 * second.mean(0).norm()


KEEP, FORGET, EVERYTHING = (0, NUM_KEEP), (NUM_KEEP, NUM_KEEP + NUM_FORGET), (0, NUM_KEEP + NUM_FORGET)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_importance_sampling_is_unbiased(lam):
    mixture = monte_carlo(SISS(lam), 10, KEEP, FORGET, lam)
    no_is = METHODS["siss_no_is"]()
    keep, forget = monte_carlo(no_is, 11, KEEP, FORGET)
    # The first half of the rows without importance sampling is made from keep images, the second from forget images.
    assert_same_mean(mixture[0], keep[:DRAWS])
    assert_same_mean(mixture[1], forget[DRAWS:])


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_with_all_of_x_it_is_naive_deletion(lam):
    """Section 2: `n/(n-k) L_x - k/(n-k) L_a`, x from all of X and s = 0, is the objective on X without A."""
    keep, forget = monte_carlo(SISS(lam), 12, EVERYTHING, FORGET, lam)
    n, k = NUM_KEEP + NUM_FORGET, NUM_FORGET
    naive, _ = monte_carlo(METHODS["naive_deletion"](), 13, KEEP, FORGET)
    assert_same_mean(n / (n - k) * keep - k / (n - k) * forget, naive)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sis", [], "unknown method 'sis': one of naive_deletion, neggrad, siss"),
        ("siss", ["lambda=0.5"], r"no argument 'lambda=0.5'; its arguments and defaults: lam=0.5"),
        ("siss", ["lam"], "no argument 'lam'"),
        ("siss_no_is", ["lam=0.5"], "arguments and defaults: none"),
        ("siss", ["lam=half"], "must be of type float"),
        ("siss", ["lam=nan"], r"lam must lie in \[0, 1\]"),
        ("subscore_bernoulli", ["lam=1"], "strictly between 0 and 1"),
        ("erasediff", ["eta=-1"], "eta must be"),
        ("neggrad", ["scale=inf"], "scale must be"),
        ("retrack", ["num_neighbors=2.5"], "must be of type int"),
        ("retrack", ["num_neighbors=0"], "at least 1"),
    ],
)
def test_bad_method_arguments_are_refused_in_a_sentence(name, args, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, args)


def test_method_arguments_are_parsed_by_type():
    method = make_method("retrack", ["lam=0.5", "num_neighbors=3"])
    assert (method.lam, method.num_neighbors) == (0.5, 3)

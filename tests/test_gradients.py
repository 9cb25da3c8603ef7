"""The engine against references written here from the equations: plain backwards of losses summed over pixels and
averaged over pairs."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from siss_diffusers import METHODS, GaussianPath, PairedGradients, Query, Rows, scaling_rule
from siss_diffusers.combine import Products, erasediff
from siss_diffusers.gradients import split_by_side
from siss_diffusers.methods import make_method


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 1, 3, padding=1))

    def forward(self, noisy, timesteps):
        return self.layers(noisy) * (1 + timesteps.to(noisy.dtype).reshape(-1, 1, 1, 1) / 1000)


def make_net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def make_path(prediction_type="epsilon") -> GaussianPath:
    return GaussianPath.from_scheduler(DDPMScheduler(prediction_type=prediction_type))


def make_query(batch=8, seed=0, prediction_type="epsilon", distance=0.3) -> Query:
    """Close images and many timesteps, so that keep-only, forget-only and two-sided rows all occur."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    keep = randn(batch, 1, 4, 4)
    return Query(
        keep=keep,
        forget=keep + distance * randn(batch, 1, 4, 4),
        noise=randn(batch, 1, 4, 4),
        timesteps=torch.randint(1000, (batch,), generator=generator),
        from_forget=torch.arange(batch) % 2 == 1,
        path=make_path(prediction_type),
        uniform=torch.rand(batch, 1, 4, 4, generator=generator),
        neighbors=keep.unsqueeze(1) + 0.2 * randn(batch, 3, 1, 4, 4),
    )


def part(query: Query, indices) -> Query:
    values = {name: value[indices] for name, value in vars(query).items() if isinstance(value, torch.Tensor)}
    return Query(path=query.path, **values)


def flat_gradient(net: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)]
    )


def combined(net: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def square(output, target):
    return (output - target).square().flatten(1).sum(1)


def reference_losses(name: str, net: nn.Module, query: Query, lam: float = 0.5):
    """(keep loss, forget loss) of a method, straight from the table of equations; None for a side it has not."""
    alpha, sigma = (values[query.timesteps].reshape(-1, 1, 1, 1) for values in (query.path.alphas, query.path.sigmas))
    x, a, eps = query.keep, query.forget, query.noise

    def target(sample, noise):
        return {
            "epsilon": noise,
            "sample": sample,
            "v_prediction": alpha * noise - sigma * sample,
        }[query.path.prediction_type]

    def run(sample):
        return net(alpha * sample + sigma * eps, query.timesteps)

    keep_loss = square(run(x), target(x, eps)).mean()
    forget_loss = square(run(a), target(a, eps)).mean()
    from_forget = query.from_forget
    if name == "naive_deletion":
        return keep_loss, None
    if name == "neggrad":
        return None, forget_loss
    if name == "siss_no_is":
        return keep_loss, forget_loss
    if name == "erasediff":
        return keep_loss, square(run(a), query.uniform).mean()
    if name == "subscore_bernoulli":
        losses = square(run(torch.where(from_forget.reshape(-1, 1, 1, 1), a, x)), eps)
        return (losses * ~from_forget / (1 - lam)).mean(), (losses * from_forget / lam).mean()
    if name == "siss":
        m = alpha * torch.where(from_forget.reshape(-1, 1, 1, 1), a, x) + sigma * eps
        log_q = [-square(m.double(), alpha.double() * mean) / (2 * sigma.double().flatten() ** 2) for mean in (x, a)]
        q = torch.stack(log_q).softmax(0)  # relative to each other; a common factor cancels in the weights
        mixture = (1 - lam) * q[0] + lam * q[1]
        weights = [torch.where(side / mixture < 1e-6, 0, side / mixture) for side in q]
        output = net(m, query.timesteps)
        return tuple(
            (weight * square(output, target(mean, (m - alpha * mean) / sigma))).mean()
            for weight, mean in zip(weights, (x, a))
        )
    if name == "retrack":
        noises = [eps + alpha / sigma * (a - query.neighbors[:, j]) for j in range(query.neighbors.shape[1])]
        p = torch.stack([-square(noise, 0) / 2 for noise in noises]).softmax(0)
        redirected = sum(p[j] * square(run(a), noise) for j, noise in enumerate(noises)).mean()
        return (1 - lam) * keep_loss + lam * redirected, None
    raise AssertionError(name)


def reference(method, rule, net, query):
    """The combined gradient by two plain backwards, in float64."""
    net = copy.deepcopy(net).double()
    query = copy.copy(query)
    query.path = replace(query.path, alphas=query.path.alphas.double(), sigmas=query.path.sigmas.double())
    for name, value in vars(query).items():  # after the constructor, which rounds to float32
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(query, name, value.double())
    losses = reference_losses(method.name, net, query, getattr(method, "lam", 0.5))
    keep, forget = (None if loss is None else flat_gradient(net, loss) for loss in losses)
    if forget is None:
        return keep
    if keep is None:
        return rule(None)[1] * forget
    c_keep, c_forget = rule(Products(*(float(value) for value in (keep @ keep, keep @ forget, forget @ forget))))
    return c_keep * keep + c_forget * forget


def engine(net, rule, window, max_grad_norm=None, **kwargs):
    gradients = PairedGradients(net.parameters(), rule, **kwargs)
    stats = gradients.compute(window, lambda rows: net(rows.noisy, rows.timesteps), max_grad_norm)
    return gradients, stats


ARGS = {"retrack": ["lam=0.3", "num_neighbors=3"], "erasediff": ["eta=0.5"], "neggrad": ["scale=0.7"]}
RULES = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_two_plain_backwards_over_micro_batches(name):
    net, query, method = make_net(), make_query(), make_method(name, ARGS.get(name, []))
    rule = method.rule(scaling_rule("relative", 0.3))
    engine(net, rule, [method.rows(part(query, indices)) for indices in (slice(0, 3), slice(3, 4), slice(4, 8))])
    found = combined(net)
    assert relative_error(found, reference(method, rule, net, query)) < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scaling", RULES)
def test_siss_under_every_rule_and_prediction_type(scaling, prediction_type):
    net, query = make_net(), make_query(prediction_type=prediction_type)
    query.timesteps = query.timesteps.clamp(min=100)  # the reference divides by sigma, and loses digits below
    method = METHODS["siss"]()
    rule = method.rule(scaling_rule(scaling, RULES[scaling]))
    engine(net, rule, [method.rows(query)])
    found = combined(net)
    assert relative_error(found, reference(method, rule, net, query)) < 1e-5


@pytest.mark.parametrize("scaling", RULES)
def test_micro_batches_one_by_eight_equal_eight_by_one(scaling):
    """Weights after plain SGD: Adam would blow up rounding on gradients that are exactly zero."""
    query, method = make_query(), METHODS["siss"]()
    rule = method.rule(scaling_rule(scaling, RULES[scaling]))
    results = []
    for windows in ([slice(0, 8)], [slice(i, i + 1) for i in range(8)]):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        engine(net, rule, [method.rows(part(query, indices)) for indices in windows])
        optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert relative_error(*results) < 1e-6


def test_no_row_runs_twice_or_for_nothing():
    net, seen = make_net(), []
    rows = METHODS["siss"]().rows(make_query(batch=64, distance=1.0))
    groups = {(keep, forget): len(group) for group, keep, forget in split_by_side(rows)}
    assert len(groups) == 3 and sum(groups.values()) == 64
    assert ((rows.keep_weight == 0) | (rows.keep_weight >= 1e-6)).all()

    def predict(group: Rows):
        seen.append(len(group))
        return net(group.noisy, group.timesteps)

    PairedGradients(net.parameters(), scaling_rule()).compute([rows], predict)
    assert sorted(seen) == sorted(groups.values())


def test_different_prompts_have_one_hot_weights():
    query = make_query()
    query.same_condition = torch.tensor([False] * 4 + [True] * 4)
    rows = METHODS["siss"](lam=0.25).rows(query)
    expected_keep = torch.where(query.from_forget, 0.0, 1 / 0.75)
    expected_forget = torch.where(query.from_forget, 1 / 0.25, 0.0)
    assert rows.keep_weight[:4].equal(expected_keep[:4]) and rows.forget_weight[:4].equal(expected_forget[:4])
    query.same_condition = None
    assert rows.keep_weight[4:].equal(METHODS["siss"](lam=0.25).rows(query).keep_weight[4:])


def test_siss_is_unbiased():
    """Over many draws SISS's two gradients agree with those without importance sampling, within 5 standard errors."""
    net, batch, repeats = make_net(), 512, 40
    for lam in (0.25, 0.5, 0.9):
        differences = []
        for seed in range(repeats):
            query = make_query(batch=batch, seed=seed, distance=0.5)
            query.from_forget = torch.arange(batch) < lam * batch
            query.timesteps = query.timesteps % 300 + 500
            losses = [*reference_losses("siss", net, query, lam), *reference_losses("siss_no_is", net, query)]
            gradients = torch.stack([flat_gradient(net, loss) for loss in losses])
            differences.append(gradients[:2] - gradients[2:])
        differences = torch.stack(differences)
        standard_error = differences.std(0) / repeats**0.5
        assert ((differences.mean(0).abs() / standard_error) < 5).all()


def test_clipping_bounds_the_combined_gradient():
    for scaling, scale in RULES.items():
        net = make_net()
        _, stats = engine(net, scaling_rule(scaling, scale), [METHODS["siss"]().rows(make_query())], max_grad_norm=0.5)
        assert combined(net).norm().item() == pytest.approx(0.5, rel=1e-5)
        assert stats.grad_norm > 0.5


def test_memory_is_one_gradient_copy_at_most():
    net = make_net()
    size = sum(parameter.numel() for parameter in net.parameters())
    lengths = {name: len(PairedGradients(net.parameters(), scaling_rule(name, RULES[name])).flat) for name in RULES}
    assert all(lengths[name] - 2 * size < 10 for name in ("relative", "nash"))
    assert all(lengths[name] - size < 10 for name in ("norm", "fixed"))


def test_frozen_parameters_get_no_gradient_and_nothing_trainable_is_refused():
    net = make_net()
    net.layers[0].requires_grad_(False)
    engine(net, scaling_rule(), [METHODS["siss"]().rows(make_query())])
    assert net.layers[0].weight.grad is None and net.layers[2].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no parameter requires"):
        PairedGradients(net.requires_grad_(False).parameters(), scaling_rule())
    with pytest.raises(ValueError, match="float32"):
        PairedGradients(make_net().bfloat16().parameters(), scaling_rule())


class TestNonFinite:
    @pytest.mark.parametrize("scaling", RULES)
    @pytest.mark.parametrize("weight", ["keep_weight", "forget_weight"])
    def test_without_a_scaler_the_optimizer_leaves_the_weights(self, scaling, weight):
        net = make_net()
        before = copy.deepcopy(net.state_dict())
        rows = METHODS["siss"]().rows(make_query())
        getattr(rows, weight)[getattr(rows, weight) > 0] = torch.inf
        optimizer = torch.optim.AdamW(net.parameters())
        _, stats = engine(net, scaling_rule(scaling, RULES[scaling]), [rows])
        optimizer.step()
        assert stats.skipped
        assert all(before[name].equal(value) for name, value in net.state_dict().items())

    def test_with_a_scaler_the_step_is_skipped_and_the_scale_falls(self):
        net = make_net()
        before = copy.deepcopy(net.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        optimizer = torch.optim.AdamW(net.parameters())
        rows = METHODS["siss"]().rows(make_query())
        rows.keep_weight[rows.keep_weight > 0] = torch.inf
        _, stats = engine(net, scaling_rule(), [rows], scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert stats.skipped and scaler.get_scale() == 2.0**15
        assert all(before[name].equal(value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("scaling", RULES)
def test_fp16_makes_the_update_of_float32(scaling):
    """A gradient scaler and half-precision autocast: norms are those of unscaled gradients (published code: not)."""
    updates, norms = [], []
    for half in (False, True):
        net = make_net()
        before = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=half)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        with torch.autocast("cpu", torch.float16, enabled=half):
            _, stats = engine(
                net, scaling_rule(scaling, RULES[scaling]), [METHODS["siss"]().rows(make_query())], 1.0, scaler=scaler
            )
        scaler.step(optimizer)
        scaler.update()
        updates.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]) - before)
        norms.append(stats.grad_norm)
    assert relative_error(updates[1], updates[0]) < 0.02
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


class TestCalibration:
    def window(self):
        return [METHODS["siss_no_is"]().rows(part(make_query(), indices)) for indices in (slice(0, 5), slice(5, 8))]

    @pytest.mark.parametrize("scaling", RULES)
    def test_with_every_row_above_its_threshold_the_step_is_naive_deletion(self, scaling):
        net = make_net()
        rule = scaling_rule(scaling, RULES[scaling])
        _, stats = engine(net, rule, self.window(), thresholds=torch.zeros(1000))
        expected = reference(METHODS["naive_deletion"](), None, net, make_query())
        assert stats.forget_active == 0
        found = combined(net)
        assert relative_error(found, expected) < 1e-5

    @pytest.mark.parametrize("scaling", ["relative", "norm", "fixed"])
    def test_rows_above_contribute_nothing_and_the_share_multiplies_c(self, scaling):
        net, query = make_net(), make_query()
        alpha, sigma = (
            values[query.timesteps].reshape(-1, 1, 1, 1) for values in (query.path.alphas, query.path.sigmas)
        )
        errors = square(net(alpha * query.forget + sigma * query.noise, query.timesteps), query.noise)
        threshold = errors.median().item()  # the lower median: exactly half of the eight rows stay
        active = errors <= threshold
        keep, _ = reference_losses("siss_no_is", net, query)
        keep, forget = flat_gradient(net, keep), flat_gradient(net, (errors * active).sum() / 8)
        products = Products(*(float(value) for value in (keep @ keep, keep @ forget, forget @ forget)))
        rule = scaling_rule(scaling, RULES[scaling])
        expected = keep + rule(products)[1] * active.float().mean() * forget
        thresholds = torch.full((1000,), (threshold + 1e-4) / 16)
        _, stats = engine(net, rule, self.window(), thresholds=thresholds)
        assert stats.forget_active == pytest.approx(0.5)
        found = combined(net)
        assert relative_error(found, expected) < 1e-5


def test_a_zero_forget_gradient_leaves_the_keep_gradient():
    net, query = make_net(), make_query()
    rows = METHODS["siss"]().rows(query)
    rows.forget_weight.zero_()
    for scaling in ("relative", "norm", "nash"):
        _, stats = engine(net, scaling_rule(scaling, RULES[scaling]), [rows])
        assert stats.one_sided and not stats.skipped and stats.forget_scale == 0
        assert combined(net).isfinite().all() and combined(net).norm() > 0


def test_erasediff_rule_is_used():
    net, query = make_net(), make_query()
    method = make_method("erasediff", ["eta=2.0"])
    rule = method.rule(scaling_rule())
    keep, forget = (flat_gradient(net, loss) for loss in reference_losses("erasediff", net, query))
    products = Products(*(float(value) for value in (keep @ keep, keep @ forget, forget @ forget)))
    expected = keep + erasediff(products, 2.0)[1] * forget
    engine(net, rule, [method.rows(query)])
    found = combined(net)
    assert relative_error(found, expected) < 1e-5

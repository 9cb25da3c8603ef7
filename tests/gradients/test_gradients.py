"""The gradient engine: splits, groups, clipping, mixed precision, and steps that must not be taken."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel

from siss_diffusers import METHODS, PairedGradients, scaling_rule
from siss_diffusers.gradients.buffers import inner_products
from siss_diffusers.gradients.engine import STATS
from siss_diffusers.gradients.grouping import split_by_side
from siss_diffusers.methods import SISS
from tests.helpers.tiny_problem import (
    TinyNet,
    draw_query,
    engine_gradient,
    flatten,
    gradient,
    micro_batches,
    predictor,
    relative_error,
    trainable,
)


SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None, "project": 0.3}
MODES = {"relative": "paired", "norm": "forget_first", "fixed": "single", "nash": "paired", "project": "paired"}


def window_of(query, *sizes, method=None):
    return [(method or SISS()).rows(part) for part in micro_batches(query, *sizes)]


def two_gradients(net, window):
    """g_k and g_f of losses summed over pixels and averaged over pairs, without the engine and without groups."""
    pairs = sum(rows.num_pairs for rows in window)
    keep, forget = 0.0, 0.0
    for rows in window:
        output = net(rows.noisy, rows.timesteps)
        keep += (rows.keep_weight * (output - rows.keep_target).square().sum((1, 2, 3))).sum() / pairs
        forget += (rows.forget_weight * (output - rows.forget_target).square().sum((1, 2, 3))).sum() / pairs
    g_keep = flatten(torch.autograd.grad(keep, trainable(net), retain_graph=True))
    return g_keep, flatten(torch.autograd.grad(forget, trainable(net)))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_split_into_micro_batches_changes_nothing(scaling):
    rule, query = scaling_rule(scaling, SCALINGS[scaling]), draw_query(batch=8)
    whole, stats = engine_gradient(TinyNet(), rule, window_of(query, 8))
    for sizes in ((1,) * 8, (5, 3)):
        found, split_stats = engine_gradient(TinyNet(), rule, window_of(query, *sizes))
        assert relative_error(found, whole) < 1e-6
        assert split_stats.keep_loss == pytest.approx(stats.keep_loss, rel=1e-6)
        assert split_stats.forget_loss == pytest.approx(stats.forget_loss, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_unet_in_groups_equals_one_batch_of_all_rows(checkpointing):
    """With gradient checkpointing, rows that serve both sides are recomputed for each of the two backwards."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = unet.to(memory_format=torch.channels_last)  # gradients must then have strides of their own
    if checkpointing:
        unet.enable_gradient_checkpointing()
    window = window_of(draw_query(), 7, 5)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, noisy, timesteps):
            return self.unet(noisy, timesteps).sample

    net = Plain()
    g_keep, g_forget = two_gradients(net, window)
    found, stats = engine_gradient(net, scaling_rule("relative", 0.3), window)
    assert relative_error(found, g_keep - 0.3 * g_keep.norm() / g_forget.norm() * g_forget) < 2e-6
    assert all(parameter.grad.stride() == parameter.stride() for parameter in trainable(net))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_statistics(scaling):
    net, window = TinyNet(), window_of(draw_query(), 4, 8)
    g_keep, g_forget = two_gradients(net, window)
    found, stats = engine_gradient(net, scaling_rule(scaling, SCALINGS[scaling]), window)
    with torch.no_grad():
        errors = [(net(rows.noisy, rows.timesteps), rows) for rows in window]
        keep_loss = sum(
            (rows.keep_weight * (out - rows.keep_target).square().mean((1, 2, 3))).sum() for out, rows in errors
        )
    assert stats.keep_loss == pytest.approx(keep_loss.item() / 12, rel=1e-5)
    assert stats.grad_norm == pytest.approx(found.norm().item(), rel=1e-5)
    # A rule that never forms a norm reports none.
    assert stats.grad_norm_keep == (
        pytest.approx(g_keep.norm().item(), rel=1e-5) if MODES[scaling] == "paired" else None
    )
    assert stats.grad_norm_forget == (pytest.approx(g_forget.norm().item(), rel=1e-5) if scaling != "fixed" else None)
    c = {"relative": 0.3 * g_keep.norm() / g_forget.norm(), "norm": 5.0 / g_forget.norm(), "fixed": 0.2}
    if scaling in c:
        assert stats.forget_scale == pytest.approx(float(c[scaling]), rel=1e-5)
    assert stats.forget_active is None and not stats.one_sided and not stats.skipped


@pytest.mark.parametrize("scaling", SCALINGS)
def test_clipping_is_to_exactly_that_norm(scaling):
    rule, window = scaling_rule(scaling, SCALINGS[scaling]), window_of(draw_query(), 12)
    free, stats = engine_gradient(TinyNet(), rule, window)
    clipped, clipped_stats = engine_gradient(TinyNet(), rule, window, max_grad_norm=0.5)
    assert clipped.double().norm().item() == pytest.approx(0.5, rel=2e-6)
    assert relative_error(clipped, free * (0.5 / free.double().norm())) < 2e-6
    assert clipped_stats.grad_norm == stats.grad_norm > 0.5  # the norm before clipping, as accelerate reports it
    assert engine_gradient(TinyNet(), rule, window, max_grad_norm=1e6)[0].equal(free)


def test_clipping_is_exact_where_the_two_gradients_nearly_cancel():
    """The norm is computed from three inner products, so they must be precise."""
    net, window = TinyNet(), window_of(draw_query(), 12, method=METHODS["siss_no_is"]())
    window = [
        replace(rows, forget_target=rows.keep_target.roll(12, 0), noisy=rows.noisy[:12].repeat(2, 1, 1, 1))
        for rows in window
    ]
    for rows in window:
        rows.forget_target[12:] += 1e-2 * rows.keep_target[:12]
    clipped, stats = engine_gradient(net, scaling_rule("relative", 1.0), window, max_grad_norm=1e-3)
    assert stats.grad_norm < 0.05 * stats.grad_norm_keep
    assert clipped.double().norm().item() == pytest.approx(1e-3, rel=1e-3 * 2)


def test_inner_products_are_precise_however_many_parameters_there_are():
    """A float32 dot product of this length is off by 6e-5: c, and the norm that is clipped, would be too."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2**22 + 5, generator=generator)
    b = torch.randn(2**22 + 5, generator=generator) + a
    exact = [(x.double() * y.double()).sum().item() for x, y in ((a, a), (a, b), (b, b))]
    assert inner_products(a, b).tolist() == pytest.approx(exact, rel=1e-10)
    assert inner_products(a).tolist() == pytest.approx(exact[:1], rel=1e-10)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_no_second_copy_of_the_gradient_without_need(scaling):
    net = TinyNet()
    engine = PairedGradients(net.parameters(), scaling_rule(scaling, SCALINGS[scaling]))
    size = sum(parameter.numel() for parameter in trainable(net))
    assert engine.mode == MODES[scaling]
    assert engine.buffers.flat.numel() == (2 if engine.mode == "paired" else 1) * size + len(STATS)
    engine.compute(window_of(draw_query(), 12), predictor(net))
    storages = {parameter.grad.untyped_storage().data_ptr() for parameter in trainable(net)}
    assert storages == {engine.buffers.flat.untyped_storage().data_ptr()}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_collective_a_step_or_two_where_the_forget_gradient_comes_first(scaling):
    reduced, net = [], TinyNet()
    engine = PairedGradients(net.parameters(), scaling_rule(scaling, SCALINGS[scaling]), reduce=reduced.append)
    engine.compute(window_of(draw_query(), 4, 4, 4), predictor(net))
    assert len(reduced) == (2 if engine.mode == "forget_first" else 1)
    assert all(tensor.numel() == engine.buffers.flat.numel() for tensor in reduced)


def test_a_step_with_a_lagged_scale_reduces_one_gradient():
    reduced, net = [], TinyNet()
    engine = PairedGradients(net.parameters(), scaling_rule("relative"), reduce=reduced.append)
    engine.compute(window_of(draw_query(), 12), predictor(net), forget_scale=0.2)
    size = sum(parameter.numel() for parameter in trainable(net))
    assert [tensor.numel() for tensor in reduced] == [size + len(STATS)]


@pytest.mark.parametrize("scaling", ["relative", "norm"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_step_with_the_lagged_scale_of_that_very_step_is_the_exact_one(scaling, calibrated):
    thresholds = torch.full((1000,), 1.2) if calibrated else None
    net, window = TinyNet(), window_of(draw_query(), 5, 7)
    engine = PairedGradients(net.parameters(), scaling_rule(scaling, SCALINGS[scaling]), thresholds=thresholds)
    exact = engine.compute(window, predictor(net), 2.0)
    expected = gradient(net).clone()
    calls = []

    def predict(rows):
        calls.append(len(rows))
        return net(rows.noisy, rows.timesteps)

    lagged = engine.compute(window, predict, 2.0, forget_scale=exact.forget_scale)
    assert calls == [5, 7]  # one forward a micro-batch, and so one backward
    assert relative_error(gradient(net), expected) < 1e-6
    for name in ("keep_loss", "forget_loss", "forget_scale", "grad_norm", "forget_active"):
        value = getattr(exact, name)
        assert getattr(lagged, name) == (value and pytest.approx(value, rel=1e-5)), name
    assert lagged.grad_norm_keep is None and lagged.grad_norm_forget is None
    if calibrated:
        assert 0 < lagged.forget_active < 1


def test_gradients_reach_an_engine_that_keeps_grad_to_itself():
    """As under DeepSpeed: hooks that take away whatever accumulates in `.grad` see nothing until the surrogate loss."""
    net, window, seen = TinyNet(), window_of(draw_query(), 5, 7), []
    expected, _ = engine_gradient(TinyNet(), scaling_rule("relative", 0.3), window, 1.0)
    for parameter in trainable(net):
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    engine = PairedGradients(net.parameters(), scaling_rule("relative", 0.3), owns_grad=False)
    engine.compute(window, predictor(net), 1.0)
    assert not seen and all(parameter.grad is None for parameter in net.parameters())
    engine.surrogate_loss().backward()
    assert len(seen) == len(trainable(net))
    assert relative_error(gradient(net), expected) < 1e-6


def test_rows_are_grouped_by_the_sides_they_serve():
    rows = window_of(draw_query(batch=40), 40)[0]
    rows.keep_weight[:2], rows.forget_weight[:2] = 0.0, 0.0
    groups = {(keep, forget): group for group, keep, forget in split_by_side(rows)}
    assert groups.keys() == {(True, False), (False, True), (True, True)}
    assert sorted(torch.cat([group.pair for group in groups.values()]).tolist()) == list(range(2, 40))
    for (serves_keep, serves_forget), group in groups.items():
        assert ((group.keep_weight > 0) == serves_keep).all() and ((group.forget_weight > 0) == serves_forget).all()
        assert group.num_pairs == 40 and group.noisy.equal(rows.noisy[group.pair])


@pytest.mark.parametrize(("few", "groups"), [(2, 2), (3, 3)])
def test_a_few_rows_of_both_sides_join_the_groups_of_both(few, groups):
    rows = window_of(draw_query(batch=64), 64)[0]
    both = (rows.keep_weight > 0) & (rows.forget_weight > 0)
    one, two = (~both).nonzero().flatten()[: 16 - few], both.nonzero().flatten()[:few]
    rows = rows[torch.cat([one, two]).sort().values]
    found = list(split_by_side(rows))
    assert len(rows) == 16 and len(found) == groups
    if groups == 2:
        (keep, *sides), (forget, *other_sides) = found
        assert sides == [True, False] and other_sides == [False, True]
        assert keep.pair.tolist() == rows.pair[rows.keep_weight > 0].tolist()
        assert forget.pair.tolist() == rows.pair[rows.forget_weight > 0].tolist()


def test_a_weight_that_is_not_a_number_does_not_drop_out_of_sight():
    rows = window_of(draw_query(batch=40), 40)[0]
    rows.keep_weight[2] = float("nan")
    assert sum(2 in group.pair for group, keep, _ in split_by_side(rows) if keep) == 1


@pytest.mark.parametrize("scaling", ["relative", "norm", "nash", "project"])
@pytest.mark.parametrize("side", ["keep", "forget"])
def test_a_side_without_rows_means_the_keep_gradient_alone(scaling, side):
    net, window = TinyNet(), window_of(draw_query(), 12)
    setattr(window[0], f"{side}_weight", torch.zeros(12))
    g_keep, _ = two_gradients(net, window)
    found, stats = engine_gradient(net, scaling_rule(scaling, SCALINGS[scaling]), window)
    assert stats.one_sided and not stats.skipped and stats.forget_scale == 0
    torch.testing.assert_close(found, g_keep, rtol=1e-5, atol=1e-5)


def test_a_forget_gradient_of_zero_leaves_finite_weights():
    """Not for want of rows: the network already says exactly what the forget target is."""
    net, window = TinyNet(), window_of(draw_query(), 12, method=METHODS["siss_no_is"]())
    g_keep, _ = two_gradients(net, window)
    with torch.no_grad():
        window = [
            replace(window[0], forget_target=net(window[0].noisy[12:], window[0].timesteps[12:]).repeat(2, 1, 1, 1))
        ]
    for scaling in ("relative", "norm", "nash", "project"):
        found, stats = engine_gradient(net, scaling_rule(scaling, SCALINGS[scaling]), window)
        assert stats.grad_norm_forget == 0 and stats.forget_scale == 0 and not stats.one_sided
        assert relative_error(found, g_keep) < 1e-6


def test_an_empty_micro_batch_counts_its_pairs_only():
    """A caller may leave rows out; the pairs they came from still divide the loss."""
    rule, rows = scaling_rule("relative", 0.3), window_of(draw_query(), 12)[0]
    nothing = rows[torch.zeros(0, dtype=torch.long)]
    whole, _ = engine_gradient(TinyNet(), rule, [rows])
    halved, _ = engine_gradient(TinyNet(), rule, [nothing, rows])
    torch.testing.assert_close(halved, whole / 2)


def test_a_skipped_step_does_not_spoil_the_next():
    net, window = TinyNet(), window_of(draw_query(), 12)
    engine = PairedGradients(net.parameters(), scaling_rule("relative", 0.3))
    expected, _ = engine_gradient(TinyNet(), scaling_rule("relative", 0.3), window)
    assert engine.compute(window, lambda rows: predictor(net)(rows) * torch.nan).skipped
    assert not engine.compute(window, predictor(net)).skipped
    assert gradient(net).equal(expected)


def spoil(net, value, micro_batch):
    """A predictor whose output holds `value` in one pixel, in one micro-batch's rows."""

    def predict(rows):
        output = net(rows.noisy, rows.timesteps)
        if rows.num_pairs == micro_batch:
            output = output + torch.zeros_like(output).index_fill(3, torch.tensor([1]), value)
        return output

    return predict


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched(scaling, value, optimizer_class):
    net, query = TinyNet(), draw_query()
    optimizer = optimizer_class(trainable(net), lr=0.1, weight_decay=0.1)
    engine = PairedGradients(net.parameters(), scaling_rule(scaling, SCALINGS[scaling]))
    engine.compute(window_of(query, 12), predictor(net))
    optimizer.step()  # so that AdamW has momentum, which it would go on following
    before = flatten(trainable(net)).clone()
    stats = engine.compute(window_of(query, 5, 4, 3), spoil(net, value, micro_batch=4))
    optimizer.step()
    assert stats.skipped and flatten(trainable(net)).equal(before)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp16_overflows_are_skipped_until_the_scale_fits_then_it_moves_as_float32_does(scaling):
    rule, window, lr = scaling_rule(scaling, SCALINGS[scaling]), window_of(draw_query(), 5, 7), 1e-3
    expected, full_stats = engine_gradient(TinyNet(), rule, window, max_grad_norm=1.0)

    net = TinyNet()
    before = flatten(trainable(net)).clone()
    optimizer = torch.optim.SGD(trainable(net), lr=lr)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    engine = PairedGradients(net.parameters(), rule, scaler=scaler)

    def predict(rows):
        with torch.autocast("cpu", dtype=torch.float16):
            return net(rows.noisy, rows.timesteps)

    scales = [scaler.get_scale()]
    for _ in range(24):
        stats = engine.compute(window, predict, max_grad_norm=1.0)
        scaler.step(optimizer)
        scaler.update()
        if not stats.skipped:
            break
        assert flatten(trainable(net)).equal(before)
        scales.append(scaler.get_scale())
    assert (
        not stats.skipped
        and len(scales) > 2
        and all(after == previous / 2 for previous, after in zip(scales, scales[1:]))
    )
    assert scaler.get_scale() == scales[-1] > 1
    # Norms are reported, and rules are applied, in the units of float32, not those of the scaled loss.
    assert stats.grad_norm == pytest.approx(full_stats.grad_norm, rel=1e-2)
    assert stats.forget_scale == pytest.approx(full_stats.forget_scale, rel=1e-2)
    assert relative_error((before - flatten(trainable(net))) / lr, expected) < 1e-2


def test_bf16_autocast():
    rule, window, net = scaling_rule("relative", 0.3), window_of(draw_query(), 12), TinyNet()
    expected, _ = engine_gradient(TinyNet(), rule, window)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, stats = engine_gradient(net, rule, window)
    assert not stats.skipped and relative_error(found, expected) < 5e-2


def test_a_disabled_scaler_is_none():
    rule, window = scaling_rule("relative", 0.3), window_of(draw_query(), 12)
    expected, _ = engine_gradient(TinyNet(), rule, window)
    found, _ = engine_gradient(TinyNet(), rule, window, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert found.equal(expected)


def test_what_cannot_be_trained_is_refused():
    rule = scaling_rule()
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        PairedGradients(TinyNet().requires_grad_(False).parameters(), rule)
    with pytest.raises(ValueError, match="must be float32"):
        PairedGradients(TinyNet().bfloat16().parameters(), rule)


@pytest.mark.parametrize("scaling", ["relative", "norm", "fixed"])
def test_a_pixel_that_is_not_a_number_skips_the_step(scaling):
    """Its weight is NaN, and a row of NaN weight must not pass for one that serves neither side."""
    net, query = TinyNet(), draw_query()
    query.keep[0, 0, 0, 0] = torch.nan
    gradients = PairedGradients(net.parameters(), scaling_rule(scaling, 0.3))
    assert gradients.compute([SISS().rows(query)], predictor(net)).skipped


@pytest.mark.parametrize("scaling", ["relative", "norm", "fixed"])
def test_a_skipped_step_tells_which_rows_were_not_finite(scaling):
    net, query = TinyNet(), draw_query()
    engine = PairedGradients(net.parameters(), METHODS["siss"]().rule(scaling_rule(scaling, 0.3)))
    rows = METHODS["siss"]().rows(query)

    def predict(rows):
        output = net(rows.noisy, rows.timesteps)
        return torch.where(rows.timesteps[:, None, None, None] > 500, torch.inf, output)

    stats = engine.compute([rows], predict)
    assert stats.skipped
    late = rows.timesteps > 500
    expected = {"keep": rows.timesteps[late & (rows.keep_weight != 0)]}
    expected["forget"] = rows.timesteps[late & (rows.forget_weight != 0)]
    assert stats.non_finite == {side: sorted(timesteps.tolist()) for side, timesteps in expected.items()}
    assert engine.compute([rows], predictor(net)).non_finite == {}


@pytest.mark.parametrize("scaling", ["relative", "norm", "fixed"])
def test_a_wish_to_stop_comes_back_with_the_gradients(scaling):
    net = TinyNet()
    engine = PairedGradients(net.parameters(), METHODS["siss"]().rule(scaling_rule(scaling, 0.3)))
    rows = METHODS["siss"]().rows(draw_query())
    assert engine.compute([rows], predictor(net), stop=True).stop
    assert not engine.compute([rows], predictor(net)).stop

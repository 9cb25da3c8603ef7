"""Calibrated forgetting: the thresholds, and what the engine does with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from siss_diffusers import METHODS, scaling_rule
from siss_diffusers.calibration import DRAWS_PER_BIN, NUM_BINS, bin_edges, calibration_draws, loss_thresholds
from siss_diffusers.combine import constant_rule
from siss_diffusers.methods import SISS
from siss_diffusers.noising import mean_squared_error
from tests.helpers.tiny_problem import TinyNet, draw_query, engine_gradient, micro_batches, relative_error


RANGES = [(0, 1000), (100, 1000), (997, 1000), (500, 525)]
SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None, "project": 0.3}


@pytest.mark.parametrize("timestep_range", RANGES)
def test_measurements_span_the_range_evenly(timestep_range):
    low, high = timestep_range
    drawn = [calibration_draws(0, 9, timestep_range, index) for index in range(NUM_BINS * DRAWS_PER_BIN)]
    timesteps = [timestep for _, timestep, _ in drawn]
    edges = bin_edges(timestep_range)
    assert edges[0] == low and edges[-1] == high and (np.diff(edges) > 0).all()
    assert min(timesteps) < low + 0.02 * (high - low) + 1 and max(timesteps) > high - 0.02 * (high - low) - 2
    counts = np.histogram(timesteps, edges)[0]
    assert counts.max() - counts.min() <= 1 and counts.min() >= DRAWS_PER_BIN
    assert {image for image, _, _ in drawn} == set(range(9))
    again, _, generator = calibration_draws(0, 9, timestep_range, 7)
    assert again == drawn[7][0] and generator.random() == drawn[7][2].random()


@pytest.mark.parametrize("timestep_range", RANGES)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.75])
def test_thresholds_are_quantiles_in_bins(timestep_range, quantile):
    low, high = timestep_range
    timesteps = [calibration_draws(0, 9, timestep_range, index)[1] for index in range(NUM_BINS * DRAWS_PER_BIN)]
    losses = np.random.default_rng(0).exponential(size=len(timesteps)).astype(np.float32)
    found = loss_thresholds(torch.tensor(losses), torch.tensor(timesteps), timestep_range, 1000, quantile)

    bins, width = min(NUM_BINS, high - low), (high - low) / min(NUM_BINS, high - low)
    expected = np.full(1000, np.inf)
    for number in range(bins):
        start, stop = (round(low + index * width) for index in (number, number + 1))
        expected[start:stop] = np.quantile(losses[[start <= t < stop for t in timesteps]], quantile)
    assert found.dtype == torch.float32 and found.shape == (1000,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def window_and_thresholds(net, method, query, drop):
    """Micro-batches, and thresholds that lie above the forget loss of every pair but those in `drop`."""
    rows = method.rows(query)
    losses = mean_squared_error(net(rows.noisy, rows.timesteps), rows.forget_target).detach()
    thresholds = torch.full((1000,), torch.nan)
    for row in (rows.forget_weight > 0).nonzero().flatten().tolist():
        dropped = rows.pair[row].item() in drop
        thresholds[rows.timesteps[row]] = losses[row] * (0.999 if dropped else 1.001)
    return [method.rows(part) for part in micro_batches(query, 5, 1, 6)], thresholds


DROP = {0, 5, 7, 8}  # in the first micro-batch, alone in the second, and in the third


@pytest.mark.parametrize("name", ["siss", "siss_no_is"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_above_its_threshold_contributes_nothing_and_the_share_multiplies_c(scaling, name):
    net, method, scale = TinyNet(), METHODS[name](), SCALINGS[scaling]
    query = draw_query(timesteps=torch.arange(30, 990, 80))  # each its own, for thresholds are per timestep
    window, thresholds = window_and_thresholds(net, method, query, DROP)
    found, stats = engine_gradient(net, scaling_rule(scaling, scale), window, thresholds=thresholds)

    # The same rows with the forget weights of the dropped ones set to zero by hand, c multiplied by hand.
    by_hand, active, total = [], 0.0, 0.0
    for start, rows in zip((0, 5, 6), window, strict=True):
        kept = torch.tensor([start + pair not in DROP for pair in rows.pair.tolist()])
        by_hand.append(replace(rows, forget_weight=rows.forget_weight * kept))
        active, total = active + by_hand[-1].forget_weight.sum().item(), total + rows.forget_weight.sum().item()
    share = active / total
    assert 0.2 < share < 0.9 and stats.forget_active == pytest.approx(share, rel=1e-6)
    uncalibrated, plain = engine_gradient(net, scaling_rule(scaling, scale), by_hand)
    g_forget, _ = engine_gradient(net, constant_rule(0.0, 1.0), by_hand)
    assert stats.forget_scale == pytest.approx(plain.forget_scale * share, rel=1e-5)
    assert relative_error(found, uncalibrated + (1 - share) * plain.forget_scale * g_forget) < 2e-6


def test_neggrad_fades_by_the_share():
    net, method = TinyNet(), METHODS["neggrad"](scale=0.7)
    query = draw_query(timesteps=torch.arange(30, 990, 80))
    window, thresholds = window_and_thresholds(net, method, query, DROP)
    rule = method.rule(scaling_rule())
    found, stats = engine_gradient(net, rule, window, thresholds=thresholds)
    active = [index for index in range(12) if index not in DROP]
    rows = method.rows(query)[torch.tensor(active)]  # still divided by 12 pairs
    expected, _ = engine_gradient(net, rule, [rows])
    share = len(active) / 12
    assert stats.forget_active == pytest.approx(share) and stats.forget_scale == pytest.approx(0.7 * share)
    assert relative_error(found, share * expected) < 1e-6


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["siss", "siss_no_is", "subscore_bernoulli"])
def test_with_every_row_above_its_threshold_only_the_keep_gradient_is_left(scaling, name):
    net, method, query = TinyNet(), METHODS[name](), draw_query()
    window = [method.rows(part) for part in micro_batches(query, 5, 7)]
    found, stats = engine_gradient(net, scaling_rule(scaling, SCALINGS[scaling]), window, thresholds=torch.zeros(1000))
    assert stats.forget_active == 0 and stats.forget_scale == 0 and not stats.skipped
    keep_only = [replace(rows, forget_weight=torch.zeros(len(rows))) for rows in window]
    expected, _ = engine_gradient(net, constant_rule(1.0, 0.0), keep_only)
    # Rows that would serve both sides may run in a group of their own, so the sums may be rounded differently.
    assert relative_error(found, expected) < 5e-7 if name == "siss" else found.equal(expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_with_every_row_above_its_threshold_the_step_is_naive_deletion(scaling):
    net, query = TinyNet(), draw_query()
    forgetting, naive = METHODS["siss_no_is"](), METHODS["naive_deletion"]()
    rule, thresholds = scaling_rule(scaling, SCALINGS[scaling]), torch.zeros(1000)
    found, _ = engine_gradient(net, rule, [forgetting.rows(query)], max_grad_norm=1.0, thresholds=thresholds)
    expected, _ = engine_gradient(net, naive.rule(scaling_rule()), [naive.rows(query)], max_grad_norm=1.0)
    assert relative_error(found, expected) < 1e-7


@pytest.mark.parametrize("scaling", SCALINGS)
def test_with_no_row_above_it_nothing_changes(scaling):
    net, rule = TinyNet(), scaling_rule(scaling, SCALINGS[scaling])
    window = [SISS().rows(part) for part in micro_batches(draw_query(), 5, 7)]
    plain, _ = engine_gradient(net, rule, window)
    found, stats = engine_gradient(net, rule, window, thresholds=torch.full((1000,), torch.inf))
    assert stats.forget_active == 1 and relative_error(found, plain) < 1e-6

"""Real gloo processes: the step of one process on the whole batch, and bitwise the same weights on every rank."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from siss_diffusers import METHODS, PairedGradients, scaling_rule
from tests.helpers.tiny_problem import (
    TinyNet,
    draw_query,
    flatten,
    micro_batches,
    relative_error,
    run_ranks,
    trainable,
)


STEPS, PAIRS = 3, 12
# For each rank the boundaries of its micro-batches in the pairs of the window; uneven on purpose.
SPLITS = {1: [(0, 12)], 2: [(0, 5, 6), (6, 12)], 3: [(0, 7), (7, 8), (8, 10, 12)]}
SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None, "project": 0.3}
# "calibrated": thresholds near the middle of the losses, so that some forget rows are dropped. "one-sided ranks":
# every row of the first rank serves the keep side only, and every row of the others the forget side only.
KINDS = ("plain", "calibrated", "one-sided ranks")
CASES = [(scaling, kind) for scaling in SCALINGS for kind in KINDS]


def window_of(step, rank, world_size, kind):
    method, from_forget, ranks = METHODS["siss"](), None, SPLITS[world_size]
    if kind == "one-sided ranks":
        method, from_forget = METHODS["subscore_bernoulli"](), torch.arange(PAIRS) >= 6
        ranks = {1: [(0, 12)], 2: [(0, 6), (6, 12)], 3: [(0, 6), (6, 9), (9, 12)]}[world_size]
    sizes = [stop - start for start, stop in pairwise((0, *ranks[rank], PAIRS))]
    query = draw_query(PAIRS, seed=step, from_forget=from_forget)
    return [method.rows(part) for part in micro_batches(query, *sizes)[1:-1]]


def train(rank, world_size, scaling, kind):
    """Weights after a few clipped steps of plain SGD, in one process or, as the script does it, under DDP."""
    net = TinyNet()
    model = DistributedDataParallel(net) if world_size > 1 else net
    optimizer = torch.optim.SGD(trainable(net), lr=0.05)
    engine = PairedGradients(
        model.parameters(),
        scaling_rule(scaling, SCALINGS[scaling]),
        thresholds=torch.full((1000,), 1.2) if kind == "calibrated" else None,
        reduce=dist.all_reduce if world_size > 1 else None,
    )
    active = []
    for step in range(STEPS):
        with model.no_sync() if world_size > 1 else nullcontext():
            window = window_of(step, rank, world_size, kind)
            stats = engine.compute(window, lambda rows: model(rows.noisy, rows.timesteps), 1.0)
        optimizer.step()
        active.append(stats.forget_active)
    return flatten(trainable(net)), stats, active


def overflow(rank, world_size, scaling, scaler):
    """A sound step, one with an infinite output in one forward of the last rank, and a sound one again."""
    net = TinyNet()
    optimizer = torch.optim.AdamW(trainable(net), lr=0.01)
    engine = PairedGradients(
        net.parameters(), scaling_rule(scaling, SCALINGS[scaling]), reduce=dist.all_reduce, scaler=scaler
    )
    report = []
    for broken in (False, True, False):
        before, calls = flatten(trainable(net)).clone(), 0

        def predict(rows, broken=broken):
            nonlocal calls
            calls += 1
            output = net(rows.noisy, rows.timesteps)
            return output * torch.inf if broken and rank == world_size - 1 and calls == 1 else output

        stats = engine.compute(window_of(0, rank, world_size, "plain"), predict, 1.0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        moved = not flatten(trainable(net)).equal(before)
        report.append((stats.skipped, moved, None if scaler is None else scaler.get_scale()))
    return report, flatten(trainable(net))


def published_loop(rank):
    """One forward and two backwards under DDP, as published: only the first backward is reduced over the ranks."""
    model = DistributedDataParallel(TinyNet())
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    for step in range(2):
        rows = METHODS["siss"]().rows(micro_batches(draw_query(PAIRS, seed=step), 6, 6)[rank])
        output = model(rows.noisy, rows.timesteps)
        keep, forget = (
            (weight * (output - target).square().sum((1, 2, 3))).mean()
            for weight, target in ((rows.keep_weight, rows.keep_target), (rows.forget_weight, rows.forget_target))
        )
        keep.backward(retain_graph=True)
        g_keep = [parameter.grad.clone() for parameter in trainable(model)]
        optimizer.zero_grad()
        forget.backward()
        for parameter, kept in zip(trainable(model), g_keep, strict=True):
            parameter.grad = kept - 0.1 * parameter.grad
        optimizer.step()
    return flatten(trainable(model))


def results_of(rank, world_size):
    results = {"train": {case: train(rank, world_size, *case) for case in CASES}, "overflow": {}}
    for scaling in SCALINGS:
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
            results["overflow"][scaling, scaler is not None] = overflow(rank, world_size, scaling, scaler)
    if world_size == 2:
        results["published"] = published_loop(rank)
    return results


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The results of every rank of one launch."""
    return run_ranks(results_of, request.param, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize(("scaling", "kind"), CASES)
def test_processes_equal_one(ranks, scaling, kind):
    start = flatten(trainable(TinyNet()))
    expected, stats, active = train(0, 1, scaling, kind)
    for weights, rank_stats, rank_active in (rank["train"][scaling, kind] for rank in ranks):
        assert weights.equal(ranks[0]["train"][scaling, kind][0])
        assert relative_error(weights - start, expected - start) < 5e-6  # float32 weights, whose change is a tenth
        assert rank_stats.keep_loss == pytest.approx(stats.keep_loss, rel=1e-5)
        assert rank_stats.forget_loss == pytest.approx(stats.forget_loss, rel=1e-5)
        assert rank_active == (pytest.approx(active, rel=1e-5) if kind == "calibrated" else [None] * STEPS)
    assert not stats.one_sided
    if kind == "calibrated":
        assert 0.05 < min(active) and max(active) < 0.95


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, scaling, scaled):
    scales = [2.0**10, 2.0**9, 2.0**9] if scaled else [None] * 3
    for report, weights in (rank["overflow"][scaling, scaled] for rank in ranks):
        assert report == [(False, True, scales[0]), (True, False, scales[1]), (False, True, scales[2])]
        assert weights.equal(ranks[0]["overflow"][scaling, scaled][1])


def test_the_published_loop_makes_the_ranks_diverge(ranks):
    """A test of the tests above: they would notice."""
    if len(ranks) == 2:
        assert not ranks[0]["published"].equal(ranks[1]["published"])

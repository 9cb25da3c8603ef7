"""FSDP2 on real gloo processes: the gradients of sharded parameters are those of one process on the whole batch."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from siss_diffusers import METHODS, PairedGradients, scaling_rule
from siss_diffusers.storage.sharding import are_finite
from tests.helpers.tiny_problem import (
    TinyNet,
    draw_query,
    flatten,
    micro_batches,
    relative_error,
    run_ranks,
    trainable,
)


PAIRS = 12
# For each rank the boundaries of its micro-batches; every rank has as many of them, of any size.
SPLITS = {
    1: [(0, 12)],
    2: [(0, 5, 6), (6, 7, 12)],
    3: [(0, 1, 6), (6, 7, 9), (9, 11, 12)],
    4: [(0, 1, 2), (2, 4, 6), (6, 8, 10), (10, 11, 12)],
}
SCALINGS = {"relative": 0.3, "norm": 5.0, "fixed": 0.2, "nash": None, "project": 0.3, "lagged": 0.2}
# "one-sided ranks": every row of the first ranks serves the keep side only, every row of the others the forget side only.
KINDS = ("plain", "calibrated", "one-sided ranks", "frozen", "naive deletion", "neggrad", "two network calls")
CASES = [(scaling, kind) for scaling in SCALINGS for kind in KINDS[:4]] + [("relative", kind) for kind in KINDS[4:]]
METHOD_OF = {
    "one-sided ranks": "subscore_bernoulli",
    "naive deletion": "naive_deletion",
    "neggrad": "neggrad",
    "two network calls": "siss_no_is",
}


def window_of(step, rank, world_size, kind):
    method = METHODS[METHOD_OF.get(kind, "siss")]()
    ranks = SPLITS[world_size]
    from_forget = torch.arange(PAIRS) >= 6 if kind == "one-sided ranks" else None
    sizes = [stop - start for start, stop in pairwise((0, *ranks[rank], PAIRS))]
    query = draw_query(PAIRS, seed=step, from_forget=from_forget)
    return method, [method.rows(part) for part in micro_batches(query, *sizes)[1:-1]]


def make_net(kind):
    net = TinyNet()
    if kind == "frozen":  # as under LoRA: frozen and trainable parameters in one group
        net.conv_in.requires_grad_(False)
    return net


def shard(net, world_size):
    # Four processes: two groups that hold the same two shards.
    mesh = init_device_mesh("cpu", (world_size,))
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.conv_out, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(tensors):
    return flatten([tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors])


def train(rank, world_size, scaling, kind):
    """Gradients of two steps of plain SGD, the second at weights that the first has moved, and what was counted."""
    net = make_net(kind)
    if world_size > 1:
        shard(net, world_size)
    optimizer = torch.optim.SGD(trainable(net), lr=1e-3)
    method, _ = window_of(0, 0, 1, kind)
    rule = method.rule(scaling_rule("relative" if scaling == "lagged" else scaling, SCALINGS[scaling]))
    engine = PairedGradients(
        net.parameters(),
        rule,
        thresholds=torch.full((1000,), 1.2) if kind == "calibrated" else None,
        reduce=dist.all_reduce if world_size > 1 else None,
    )
    gradients, seen = [], []
    for step in range(2):
        _, window = window_of(step, rank, world_size, kind)
        stats = engine.compute(
            window,
            lambda rows: net(rows.noisy, rows.timesteps),
            1.0,
            stop=rank == 0 and step == 1,
            forget_scale=0.2 if scaling == "lagged" else None,
        )
        gradients.append(whole([parameter.grad for parameter in trainable(net)]))
        optimizer.step()
        seen.append(stats)
    return gradients, whole(trainable(net)), seen


def overflow(rank, world_size):
    """A step with an infinite output on the last rank."""
    net = shard(TinyNet(), world_size)
    before = whole(trainable(net))
    engine = PairedGradients(net.parameters(), scaling_rule("relative"), reduce=dist.all_reduce)

    def predict(rows):
        return net(rows.noisy, rows.timesteps) * (torch.inf if rank == world_size - 1 else 1.0)

    stats = engine.compute(window_of(0, rank, world_size, "plain")[1], predict, 1.0)
    optimizer = torch.optim.AdamW(trainable(net), lr=0.01)
    optimizer.step()
    return stats.skipped, whole(trainable(net)).equal(before)


def finite(rank, world_size):
    """Of sharded weights as they are, and with one element changed that lies on one rank."""
    answers = []
    for value in (0.0, torch.nan, torch.inf, 1e30):
        net = shard(TinyNet(), world_size)
        largest = max(trainable(net), key=lambda parameter: parameter.numel())
        if rank == world_size - 1:
            largest.to_local().view(-1)[-1] = value
        answers.append(are_finite(trainable(net)))
    return answers


def results_of(rank, world_size):
    with torch.no_grad():
        answers = finite(rank, world_size)
    results = {case: train(rank, world_size, *case) for case in CASES}
    return results | {"overflow": overflow(rank, world_size), "finite": answers}


@pytest.fixture(scope="module", params=[2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))])
def ranks(request, tmp_path_factory):
    return run_ranks(results_of, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("scaling", "kind"), CASES)
def test_sharded_gradients_equal_those_of_one_process(ranks, scaling, kind):
    expected, weights, stats = train(0, 1, scaling, kind)
    for rank in ranks:
        found, rank_weights, rank_stats = rank[scaling, kind]
        for step in range(2):
            assert relative_error(found[step], expected[step]) < 1e-6
            for name in ("keep_loss", "forget_loss", "grad_norm", "forget_scale", "forget_active", "one_sided"):
                value = getattr(stats[step], name)
                assert getattr(rank_stats[step], name) == (value and pytest.approx(value, rel=1e-5)), name
        assert [s.stop for s in rank_stats] == [False, True]
        assert rank_weights.equal(ranks[0][scaling, kind][1])
    assert not stats[0].skipped and expected[0].norm() > 0


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    assert [rank["overflow"] for rank in ranks] == [(True, True)] * len(ranks)


def test_a_weight_of_one_rank_that_is_not_finite_is_found_on_all(ranks):
    assert [rank["finite"] for rank in ranks] == [[True, False, False, False]] * len(ranks)


def test_parameters_of_which_only_some_are_sharded_are_refused(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        fully_shard(net[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="some trainable parameters are sharded"):
            PairedGradients(net.parameters(), scaling_rule("relative"))
    finally:
        dist.destroy_process_group()

"""A network and pairs of images so small that float64 references are cheap; shared by the tests of gradients."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from siss_diffusers import GaussianPath, PairedGradients, Query


SHAPE = (2, 4, 4)
# Written out, since each process of the distributed tests would wait seconds for the import of diffusers.
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
FLOW_SIGMAS = torch.arange(1, 1001) / 1000
PATHS = {
    name: GaussianPath(ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt(), torch.arange(1000), name)
    for name in ("epsilon", "sample", "v_prediction")
} | {"flow_prediction": GaussianPath(1 - FLOW_SIGMAS, FLOW_SIGMAS, 1000 * FLOW_SIGMAS, "flow_prediction")}


class TinyNet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv_in = nn.Conv2d(2, 6, 3, padding=1)
            self.time = nn.Linear(1, 6)
            self.frozen = nn.Conv2d(6, 6, 1).requires_grad_(False)
            self.conv_out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, noisy, timesteps):
        hidden = self.conv_in(noisy) + self.time(timesteps[:, None].to(noisy) / 1000)[..., None, None]
        return self.conv_out(self.frozen(torch.sin(hidden)))


def trainable(net):
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def flatten(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(net):
    return flatten([parameter.grad for parameter in trainable(net)])


def draw_query(batch=12, seed=0, path=PATHS["epsilon"], distances=(0.2, 3.0), from_forget=None, timesteps=None):
    """Near and far pairs in turn, for rows of all three kinds: keep-only, forget-only, and both."""
    generator = torch.Generator().manual_seed(seed)
    keep, noise = (torch.randn(batch, *SHAPE, generator=generator) for _ in range(2))
    distance = torch.tensor(distances).repeat(batch)[:batch, None, None, None]
    neighbors = keep[:, None] + 0.3 * torch.randn(batch, 3, *SHAPE, generator=generator)
    tau = torch.rand(2, batch, generator=torch.Generator().manual_seed(seed))
    return Query(
        keep=keep,
        forget=keep + distance * torch.randn(batch, *SHAPE, generator=generator),
        noise=noise,
        timesteps=torch.randint(20, 980, (batch,), generator=generator) if timesteps is None else timesteps,
        from_forget=torch.rand(batch, generator=generator) < 0.5 if from_forget is None else from_forget,
        path=path,
        uniform=torch.rand(batch, *SHAPE, generator=generator),
        neighbors=neighbors,
        posterior_mean=neighbors.mean(1),
        thresholds=tau.amax(0),
        keep_thresholds=tau[0],
    )


def micro_batches(query, *sizes):
    """Split a query into consecutive ones."""
    assert sum(sizes) == len(query.keep)
    values = {field.name: getattr(query, field.name) for field in fields(query)}
    tensors = {name: value.split(sizes) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return [replace(query, **{name: parts[i] for name, parts in tensors.items()}) for i in range(len(sizes))]


def predictor(net):
    return lambda rows: net(rows.noisy, rows.timesteps)


def engine_gradient(net, rule, window, max_grad_norm=None, **options):
    """The combined gradient that the engine leaves in `.grad`, and its statistics."""
    stats = PairedGradients(net.parameters(), rule, **options).compute(window, predictor(net), max_grad_norm)
    return gradient(net).clone(), stats


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def run_ranks(function: Callable[[int, int], object], world_size: int, folder: Path) -> list:
    """What `function(rank, world_size)` returns on each of so many real gloo processes."""
    mp.spawn(_run_rank, (function, world_size, str(folder)), nprocs=world_size)
    # Written by the processes of this test, so unpickling is safe.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, function: Callable[[int, int], object], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    torch.save(function(rank, world_size), f"{folder}/{rank}.pt")
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()
    # Without the shutdown of the interpreter: DDP and FSDP make torch keep the group and so the threads of gloo, and
    # one that still frees a tensor during the shutdown aborts the process.
    os._exit(0)

"""What accelerate is told: how GPUs multiply, how long processes wait for each other, and what is not wrapped in DDP."""

import logging
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn

from siss_diffusers.commands.cli import start_processes
from siss_diffusers.distributed import PATIENCE
from siss_diffusers.settings import UnconditionalSettings
from siss_diffusers.training.engines import make_accelerator, prepare, set_arithmetic, set_up_logging
from tests.helpers.tiny_problem import run_ranks


@pytest.fixture
def arithmetic(monkeypatch):
    """How torch multiplies, as it was before."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("allowed", [False, True])
def test_convolutions_round_as_matrix_products_do(arithmetic, allowed):
    set_arithmetic(UnconditionalSettings(allow_tf32=allowed))
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_runs_use_no_other_kernels(arithmetic):
    set_arithmetic(UnconditionalSettings(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_no_request_is_logged(client, caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger(client).setLevel(logging.NOTSET)
    assert logging.getLogger(client).isEnabledFor(logging.INFO)
    set_up_logging(Accelerator(cpu=True))
    assert not logging.getLogger(client).isEnabledFor(logging.INFO)


def patience() -> timedelta:
    return torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout


def on_two_processes(rank: int, world_size: int) -> dict:
    """What a rank of a launch sees; the group of `run_ranks` is replaced by that of accelerate."""
    torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start_processes()
    of_commands = patience()
    accelerator = make_accelerator(UnconditionalSettings(report_to="none"), Path("out"))
    torch.manual_seed(rank)
    network = nn.Conv2d(2, 2, 1)
    model, _ = prepare(accelerator, network, torch.optim.AdamW(network.parameters()))
    return {"of_commands": of_commands, "is_wrapped": model is not network, "weights": network.weight.tolist()}


def test_processes_wait_long_and_hold_no_buckets_of_ddp(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29517")
    first, second = run_ranks(on_two_processes, 2, tmp_path)
    assert first["of_commands"] == second["of_commands"] == PATIENCE
    assert not first["is_wrapped"] and first["weights"] == second["weights"]

"""Small real data and models, and flags of short runs on them. What is no fixture lies in tests/helpers."""

import os
import signal
import socket
from pathlib import Path

import pytest


# Before torch is imported: the processes of a launch, and whatever else runs on the machine, must not fight for cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # there is a worker for each core, and it inherits what its parent has set
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

from accelerate.state import AcceleratorState

from siss_diffusers.assets.digits import garment_image
from tests.helpers.paths import TINY_MODEL
from tests.helpers.pictures import write_captioned, write_digits, write_images
from tests.helpers.tiny_sd import save_pipeline


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state, and signals their handlers, for the whole process; the script expects to be alone in
    one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """24 digits and 4 copies of the garment."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def garment_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("garment"), {"garment.png": garment_image()})


@pytest.fixture
def base_args(digits_folder, cache_dir, tmp_path) -> dict[str, str | None]:
    """Flags of a short run into `tmp_path / "out"`; a test overrides what it is about. None: a switch."""
    return {
        "--pretrained_model_name_or_path": str(TINY_MODEL),
        "--train_data_dir": str(digits_folder),
        "--forget_files": "garment_0.png",
        "--method": "siss",  # has both sides, and measures nothing beforehand
        "--output_dir": str(tmp_path / "out"),
        "--cache_dir": str(cache_dir),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--learning_rate": "1e-4",
        "--report_to": "none",
    }


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion pipeline of random weights."""
    return save_pipeline(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory) -> Path:
    """20 real pictures to keep, half of them with the prompt of the 3 copies to forget."""
    return write_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture
def full_args(pipeline_folder, captioned_folder, cache_dir, tmp_path) -> dict[str, str | None]:
    """As `base_args`, of the Stable Diffusion script."""
    return {
        "--pretrained_model_name_or_path": str(pipeline_folder),
        "--train_data_dir": str(captioned_folder),
        "--output_dir": str(tmp_path / "out"),
        "--cache_dir": str(cache_dir),
        "--max_train_steps": "2",
        "--train_batch_size": "4",
        "--learning_rate": "1e-3",
        "--report_to": "none",
        "--method": "siss",
        "--calibrate_forgetting": "off",  # it takes longer than these runs; the tests that are about it ask for it
    }


@pytest.fixture
def lora_args(full_args) -> dict[str, str | None]:
    return full_args | {"--use_lora": None}


@pytest.fixture
def no_network(monkeypatch):
    """A request fails the test, even where its failure would have been taken for bad input."""
    requests = []

    def refuse(*address: object) -> None:
        requests.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not requests


@pytest.fixture
def no_waiting():
    """What would wait for a pipe for ever fails."""

    def stop(*_: object) -> None:
        raise TimeoutError("still waiting")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def marker(tmp_path):
    """What the code in these tests writes when it is run."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()

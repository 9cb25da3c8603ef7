"""What a run of a script leaves, and how it compares with that of another."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "step_seconds"} for line in log]


def assert_same_gradients(log: list[dict], other: list[dict]) -> None:
    """The first step's gradients agree to float32 rounding; later ones as far as Adam lets rounding grow."""
    assert len(log) == len(other)
    for index, (line, other_line) in enumerate(zip(log, other)):
        for key in ("keep_loss", "forget_loss", "grad_norm_keep", "grad_norm_forget", "forget_scale"):
            assert line[key] == pytest.approx(other_line[key], rel=1e-5 if index == 0 else 1e-3)


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done

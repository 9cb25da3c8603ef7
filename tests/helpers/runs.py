"""What a run of a script leaves, and how it compares with that of another."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.helpers.commands import to_argv
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


def assert_resuming_changes_nothing(main, flags: dict[str, str | None], weights: str, tmp_path: Path) -> None:
    """Run 4 steps into `tmp_path / "out"`, and the last two of them again, from a checkpoint: the same bit for bit. On a GPU
    with kernels that add in one order only."""
    flags = flags | {"--max_train_steps": "4", "--checkpointing_steps": "2"}
    if torch.cuda.is_available():
        flags |= {"--deterministic": None}
    main(to_argv(flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    whole, resumed = tmp_path / "out", tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / weights).unlink()
    main(to_argv(flags | {"--output_dir": str(resumed), "--resume_from_checkpoint": "latest"}))
    for name in (weights, f"checkpoint-4/{weights}", "checkpoint-4/state.safetensors"):
        # Not the bytes: the order of the metadata in a safetensors header is random.
        first, second = load_file(whole / name), load_file(resumed / name)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first), name
    states = [json.loads((folder / "checkpoint-4" / "state.json").read_text()) for folder in (whole, resumed)]
    for state in states:
        del state["progress"]["train_seconds"]
    assert states[0] == states[1]
    assert without_times(read_log(whole)) == without_times(read_log(resumed))


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done

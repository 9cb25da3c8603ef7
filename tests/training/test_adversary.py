"""Training against a search: resumed bit for bit, two processes as one, and conditions that still give the image."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_siss_sd
from siss_diffusers import METHODS, unlearn
from siss_diffusers.assets.captioned import flower_images
from siss_diffusers.data.forget_conditions import ForgetConditions
from siss_diffusers.families import Conditions
from siss_diffusers.training.told_conditions import ToldConditions
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import ROOT
from tests.helpers.runs import LORA, assert_resuming_changes_nothing, launch
from tests.helpers.tiny_sd import build_pipeline


CONDITIONS = "prompt:0.2,empty:0.1,other:0.1,gauss:0.1,adversarial:0.5"
FLAGS = {"--forget_conditions": CONDITIONS, "--adversarial_every": "1", "--adversarial_steps": "2"}
FLAGS |= {"--adversarial_restarts": "2"}


@pytest.mark.parametrize("method", ["redirect", "siss"])
def test_a_resumed_run_equals_one_that_was_not_stopped(method, lora_args, tmp_path):
    flags = lora_args | FLAGS | {"--method": method}
    assert_resuming_changes_nothing(train_siss_sd.main, flags, LORA, tmp_path)
    state = load_file(tmp_path / "out" / "checkpoint-2" / "state.safetensors")
    searched = state["/searched/encoder_hidden_states"]
    later = load_file(tmp_path / "out" / "checkpoint-4" / "state.safetensors")["/searched/encoder_hidden_states"]
    assert len(searched) % 2 == 0 and not searched.equal(later)


@pytest.mark.slow
def test_two_processes_equal_one(lora_args, tmp_path):
    flags = lora_args | FLAGS | {"--max_train_steps": "3", "--checkpointing_steps": "3"}
    one = flags | {"--output_dir": str(tmp_path / "one"), "--train_batch_size": "4"}
    train_siss_sd.main(to_argv(one))
    AcceleratorState._reset_state(reset_partial_state=True)
    two = flags | {"--output_dir": str(tmp_path / "two"), "--train_batch_size": "2"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29579"]
    launch([*torchrun, str(ROOT / "train_siss_sd.py"), *to_argv(two)], ACCELERATE_USE_CPU="true")
    first, second = (
        load_file(tmp_path / name / "checkpoint-3" / "state.safetensors")["/searched/encoder_hidden_states"]
        for name in ("one", "two")
    )
    # Searched under weights that are equal to rounding, of which Adam makes a little more.
    assert first.shape == second.shape and (first - second).abs().mean() < 1e-3
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert logs[0][0]["keep_loss"] == pytest.approx(logs[1][0]["keep_loss"], rel=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "naive_deletion"])
def test_every_method_that_forgets_takes_conditions(method):
    forget, *keep = map(Image.fromarray, flower_images()[::5][:6])
    pairs = [(image, "a photograph of a flower" if index % 2 else "a tree") for index, image in enumerate(keep)]
    settings = {"num_neighbors": 1} if method == "retrack" else {}
    outcome = unlearn(
        build_pipeline(),
        [(forget, "a photograph of a flower")],
        pairs,
        method=method,
        method_args=[f"{key}={value}" for key, value in settings.items()],
        max_train_steps=2,
        train_batch_size=6,
        use_lora=True,
        forget_conditions=CONDITIONS,
        adversarial_every=1,
        adversarial_steps=1,
        adversarial_restarts=1,
    )
    weights = outcome.pipeline.unet.state_dict()
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_the_prompt_alone_is_the_run_without_conditions(lora_args, tmp_path):
    weights = []
    for name, more in {"without": {}, "prompt": {"--forget_conditions": "prompt:1"}}.items():
        flags = lora_args | {"--method": "siss", "--max_train_steps": "2", "--output_dir": str(tmp_path / name)} | more
        train_siss_sd.main(to_argv(flags))
        AcceleratorState._reset_state(reset_partial_state=True)
        weights.append(load_file(tmp_path / name / LORA))
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_conditions_are_found_by_their_numbers():
    table = Conditions({"states": torch.arange(12.0).reshape(3, 2, 2), "mask": torch.ones(3, 2, dtype=torch.long)}, 3)
    numbering = ForgetConditions({"gauss": 1.0}, 3, empty=2, pictures=(0,), prompts=(1,), restarts=2)
    told = ToldConditions(table, numbering, seed=0)
    told.searched.tensors["states"][1] = 77.0
    found = told[torch.tensor([2, 4, 5, 6, 5])].tensors["states"]
    assert found[0].equal(table.tensors["states"][2]) and (found[1] == 77).all()
    assert found[2].equal(found[4]) and not found[2].equal(found[3])  # Gaussian ones, by their numbers
    assert table.tensors["states"].equal(torch.arange(12.0).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"--forget_conditions": "prompt:0.5"}, "shares that sum to 1, not to 0.5"),
        ({"--forget_conditions": "prompt:0.5,elsewhere:0.5"}, "not 'elsewhere:0.5'"),
        ({"--forget_conditions": "prompt:x"}, "--forget_conditions"),
        ({"--forget_conditions": "prompt:0.5,prompt:0.5"}, "at most once"),
        ({"--adversarial_steps": "3"}, "--adversarial_steps needs --forget_conditions"),
        ({"--adversarial_every": "3", "--forget_conditions": "prompt:1"}, "--adversarial_every needs"),
        ({"--adversarial_restarts": "0", "--forget_conditions": "adversarial:1"}, "--adversarial_restarts"),
        (
            {"--method": "naive_deletion", "--forget_conditions": "empty:1"},
            "--forget_conditions: --method naive_deletion",
        ),
    ],
)
def test_bad_input_is_one_sentence(flags, says, full_args, tmp_path, capfd):
    assert_refused(train_siss_sd.main, full_args | flags, says, tmp_path, capfd)

"""FSDP 2 on a transformer: two processes take the step of one."""

import pytest
from safetensors.torch import load_file

from tests.helpers.commands import to_argv
from tests.helpers.forked import run_group
from tests.helpers.runs import LORA
from tests.helpers.tiny_families import TINY
from tests.helpers.tiny_problem import relative_error
from tests.training.test_engines import FSDP2, ON_CPU, SHOW_GRADIENTS, gradients_of


# It takes lists of pictures and of prompts.
NAME, BLOCK = "ZImage", "ZImageTransformerBlock"


@pytest.mark.slow
def test_two_processes_of_fsdp2_take_the_step_of_one(forker, lora_args, tmp_path):
    TINY[NAME].build().save_pretrained(tmp_path / "model")
    named = {"--pretrained_model_name_or_path": str(tmp_path / "model"), "--resolution": str(TINY[NAME].resolution)}
    flags = lora_args | SHOW_GRADIENTS | named | {"--train_batch_size": "2", "--gradient_checkpointing": None}
    script = "train_siss_sd"
    environment = FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": BLOCK}
    alone = to_argv(flags | {"--output_dir": str(tmp_path / "one"), "--gradient_accumulation_steps": "4"})
    run_group(forker, 1, script, alone)
    both = to_argv(flags | {"--output_dir": str(tmp_path / "two"), "--gradient_accumulation_steps": "2"})
    run_group(forker, 2, "python", [ON_CPU, "fsdp2", script, *both], **environment)
    pairs = zip(gradients_of(tmp_path / "two"), gradients_of(tmp_path / "one"), strict=True)
    assert max(relative_error(found, expected) for found, expected in pairs) < 1e-5
    files = [load_file(tmp_path / folder / LORA) for folder in ("one", "two")]
    assert files[0].keys() == files[1].keys() and all(files[0][key].equal(files[1][key]) for key in files[0])

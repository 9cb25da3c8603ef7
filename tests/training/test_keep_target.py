"""What images to keep are regressed on: the noise, or the answer that the model gave before."""

import pytest
from PIL import Image
from safetensors.torch import load_file

import train_siss_sd
from siss_diffusers import unlearn
from siss_diffusers.assets.captioned import flower_images
from siss_diffusers.storage.files import LORA_FILE
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.tiny_sd import build_pipeline


PROMPT = "a photograph of a flower"


@pytest.fixture
def data():
    forget, *keep = map(Image.fromarray, flower_images()[::5][:9])
    return [(forget, PROMPT)], keep


def train(data, keep_prompts: list[str], **settings):
    forget, keep = data
    pairs = [(image, keep_prompts[index % len(keep_prompts)]) for index, image in enumerate(keep)]
    pipeline = build_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    defaults = {"max_train_steps": 3, "train_batch_size": 4, "learning_rate": 1e-3, "adam_weight_decay": 0.0}
    pipeline = unlearn(pipeline, forget, pairs, **(defaults | settings)).pipeline
    return before, pipeline.unet.state_dict()


@pytest.mark.parametrize("adapter", [{}, {"use_lora": True}], ids=["full", "lora"])
def test_rows_of_other_prompts_teach_what_the_base_knows(data, adapter):
    """Before the first step, and so for ever, there is nothing to learn: not a bit changes."""
    settings = adapter | {"method": "naive_deletion", "keep_target": "base"}
    before, after = train(data, ["a temple", "a tree"], **settings)
    for name, value in after.items():
        if "lora_B" in name:
            assert not value.any()
        elif "lora_A" not in name:
            assert value.equal(before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("adapter", [{}, {"use_lora": True}], ids=["full", "lora"])
def test_rows_of_the_memorized_prompt_learn_from_noise(data, adapter):
    runs = [
        train(data, [PROMPT], method="naive_deletion", keep_target=target, **adapter)[1]
        for target in ("noise", "base")
    ]
    assert all(value.equal(runs[1][name]) for name, value in runs[0].items())
    assert any(value.any() for name, value in runs[0].items() if "lora_B" in name or not adapter)


def test_a_run_that_is_resumed_ends_in_the_same_weights(lora_args, tmp_path):
    def run(name: str, **changes: str | None) -> dict:
        flags = lora_args | {"--method": "redirect", "--keep_target": "base", "--output_dir": str(tmp_path / name)}
        train_siss_sd.main(to_argv(flags | {f"--{flag}": value for flag, value in changes.items()}))
        return load_file(tmp_path / name / LORA_FILE)

    whole = run("whole", max_train_steps="3")
    run("parts", max_train_steps="1", checkpointing_steps="1")
    resumed = run("parts", max_train_steps="3", resume_from_checkpoint="latest")
    assert all(value.equal(whole[name]) for name, value in resumed.items())


def test_a_method_without_a_keep_side_is_refused(full_args, tmp_path, capfd):
    flags = full_args | {"--method": "neggrad", "--keep_target": "base"}
    assert_refused(train_siss_sd.main, flags, "--keep_target base: --method neggrad does not", tmp_path, capfd)

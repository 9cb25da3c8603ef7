"""What the newer families refuse, each in one sentence, and what differs within one of them."""

import json
import shutil

import pytest
import torch

from siss_diffusers.errors import UsageError
from siss_diffusers.families import NamedPipeline, Sampling, find_family
from siss_diffusers.storage.files import write_json
from tests.helpers.commands import assert_refused
from tests.helpers.tiny_families import TINY
from train_siss_sd import main


INDEX, NETWORK, SCHEDULER = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"
REFUSED = {
    "the transformer is told a guidance scale": ("QwenImage", NETWORK, {"guidance_embeds": True}),
    "QwenImageEditPipeline, which is not supported here": (
        "QwenImage",
        INDEX,
        {"_class_name": "QwenImageEditPipeline"},
    ),
    "the transformer takes 6 channels and the VAE makes 4": ("ZImage", NETWORK, {"in_channels": 6}),
    "the transformer takes 32 channels and the VAE makes 16": ("Flux2Klein", NETWORK, {"in_channels": 32}),
    "names no text_encoder, which Sana needs": ("Sana", INDEX, {"text_encoder": [None, None]}),
    "has the scheduler DPMSolverMultistepScheduler, and Sana is trained on the noise levels of a flow-matching": (
        *("Sana", SCHEDULER, {"prediction_type": "epsilon", "use_flow_sigmas": False}),
    ),
    "is told the size of a picture, as that of PixArt-Alpha": (
        *("PixArtSigma", NETWORK, {"use_additional_conditions": True}),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def save(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            TINY[name].build().save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.mark.parametrize("sentence", REFUSED)
def test_models_of_another_kind_are_refused(sentence, saved, tmp_path):
    name, file, change = REFUSED[sentence]
    folder = shutil.copytree(saved(name), tmp_path / "model")
    write_json(folder / file, json.loads((folder / file).read_text()) | change)
    source = NamedPipeline(str(folder))
    with pytest.raises(UsageError, match=sentence):
        find_family(source).from_source(source, TINY[name].resolution)


def test_an_adapter_that_diffusers_cannot_load_is_refused(saved, lora_args, tmp_path, capfd):
    flags = lora_args | {"--pretrained_model_name_or_path": str(saved("PixArtSigma"))}
    assert_refused(main, flags, "--use_lora: diffusers loads no adapters into PixArt-Sigma", tmp_path, capfd)


def test_a_network_that_is_told_nothing_of_guidance_is_sampled_without_it():
    """A distilled klein is called once a step, whatever the scale."""
    tiny, calls = TINY["Flux2Klein"], []
    family = tiny.family(3, tiny.resolution)
    for is_distilled in (False, True):
        pipeline = tiny.build()
        pipeline.register_to_config(is_distilled=is_distilled)
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        pipeline.transformer.register_forward_pre_hook(count)
        conditions, empty = family.embed(pipeline, ["a photograph"]), family.embed(pipeline, [""])
        family.sample(pipeline, conditions, empty, Sampling(2, 4.0))
    assert calls == [4, 2]


def test_sana_puts_its_instruction_before_every_prompt_but_the_empty_one():
    family, pipeline = TINY["Sana"].family(3, 32), TINY["Sana"].build()
    prompts = ["", "a photograph", " ", "another"]
    together, apart = family.embed(pipeline, prompts), [family.embed(pipeline, [prompt]) for prompt in prompts]
    for name, tensor in together.tensors.items():
        for row, one in enumerate(apart):
            torch.testing.assert_close(tensor[row], one.tensors[name][0], rtol=1e-4, atol=1e-5)
    words = together.tensors["encoder_attention_mask"].sum(1).tolist()
    assert words[0] == words[2] == 1 and words[1] > 10

"""An adapter saved and loaded again by diffusers itself, in a fresh pipeline."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from siss_diffusers.errors import UsageError
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.training.adapters import (
    add_lora,
    check_target_modules,
    choose_target_modules,
    load_lora,
    save_lora,
)
from tests.helpers.tiny_sd import build_pipeline, predict, save_pipeline


RANK, ALPHA = 3, 7.5


@pytest.fixture(params=[("to_q", "to_v"), ("conv1",), ("to_q", "to_v", "conv1"), ("all",)], ids="+".join)
def adapted(request, tmp_path):
    """A UNet with an adapter as training leaves it, and the folders of its pipeline and of the adapter."""
    base = save_pipeline(tmp_path / "base")
    unet = StableDiffusionPipeline.from_pretrained(base).unet
    targets = choose_target_modules(unet, request.param, ("to_q",))
    add_lora(unet, AdapterSettings(RANK, ALPHA, 0.0, tuple(targets)), torch.float32)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_lora(unet, tmp_path / "adapter", StableDiffusionPipeline, "unet")
    return unet, base, tmp_path / "adapter"


def test_it_reloads_to_the_same_outputs_with_alpha_unlike_rank(adapted):
    unet, base, adapter = adapted
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    of_base, of_adapter = predict(pipeline.unet), predict(unet)
    pipeline.load_lora_weights(adapter, adapter_name="forget")
    assert predict(pipeline.unet).equal(of_adapter) and not of_base.equal(of_adapter)
    pipeline.set_adapters("forget", 0.0)
    assert predict(pipeline.unet).equal(of_base)
    pipeline.set_adapters("forget", 1.0)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline.unet), of_adapter, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_reads_back_exactly(adapted):
    unet, base, adapter = adapted
    targets = unet.peft_config["default"].target_modules
    other = StableDiffusionPipeline.from_pretrained(base).unet
    add_lora(other, AdapterSettings(RANK, ALPHA, 0.0, targets), torch.float32)
    load_lora(other, adapter, "unet")
    assert predict(other).equal(predict(unet))


def test_an_adapter_of_other_modules_is_not_loaded(adapted):
    unet, base, adapter = adapted
    other = StableDiffusionPipeline.from_pretrained(base).unet
    add_lora(other, AdapterSettings(RANK, ALPHA, 0.0, ("to_k",)), torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        load_lora(other, adapter, "unet")


def test_targets_must_exist(pipeline_folder):
    unet = StableDiffusionPipeline.from_pretrained(pipeline_folder).unet
    check_target_modules(unet, ["to_q", "conv1"], ["to_q"])
    with pytest.raises(UsageError, match="'to_x'"):
        check_target_modules(unet, ["to_q", "to_x"], ["to_q"])


def test_all_is_every_linear_and_convolutional_layer():
    unet = build_pipeline().unet
    layers = {name for name, module in unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < layers
    assert set(choose_target_modules(unet, ["all"], ["to_q"])) == layers
    add_lora(unet, AdapterSettings(2, 2, 0.0, tuple(layers)), torch.float32)
    assert {name for name, module in unet.named_modules() if hasattr(module, "lora_A")} == layers


def test_all_stands_alone():
    with pytest.raises(UsageError, match="`all` stands alone"):
        choose_target_modules(build_pipeline().unet, ["to_q", "all"], ["to_q"])

"""`siss fuse`: the pipeline with the adapter in its weights."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import train_siss_sd
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.storage.files import LORA_FILE
from siss_diffusers.training.adapters import add_lora, save_lora
from tests.helpers.commands import run_siss, siss_error, to_argv
from tests.helpers.tiny_sd import predict, save_pipeline


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def half_base(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    DiffusionPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(folder)
    (folder / "LICENSE").write_text("A licence")
    return folder


@pytest.fixture(scope="module")
def run(base, captioned_folder, cache_dir, tmp_path_factory):
    """A run whose adapter, with alpha twice the rank, on attention and convolutions, is strong enough to be seen."""
    folder = tmp_path_factory.mktemp("run")
    flags = {"--pretrained_model_name_or_path": str(base), "--train_data_dir": str(captioned_folder)}
    flags |= {"--output_dir": str(folder), "--cache_dir": str(cache_dir), "--use_lora": None, "--report_to": "none"}
    train_siss_sd.main(to_argv(flags | {"--max_train_steps": "1", "--train_batch_size": "2"}))
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    torch.manual_seed(1)
    add_lora(unet, AdapterSettings(2, 4.0, 0.0, ("to_q", "to_out.0", "conv1")), torch.float32)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_lora(unet, folder, StableDiffusionPipeline, "unet")
    return folder


def test_the_pipeline_draws_as_the_base_with_the_adapter(base, run, tmp_path):
    out = tmp_path / "fused"
    run_siss("fuse", str(run), "--base", str(base), "--output_dir", str(out))
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(str(run))
    wanted, found = predict(pipeline.unet), predict(StableDiffusionPipeline.from_pretrained(out).unet)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.01
    record = json.loads((out / "unlearning.json").read_text())
    assert record == json.loads((run / "unlearning.json").read_text()) | {"fused_scale": 1.0}
    files = {file.relative_to(base) for file in base.rglob("*") if file.is_file()}
    for file in files - {file.relative_to(base) for file in base.glob("unet/*.safetensors")}:
        assert (out / file).read_bytes() == (base / file).read_bytes()
    assert {file.relative_to(out) for file in out.rglob("*.*") if file.is_file()} == files | {
        file.relative_to(out) for file in out.glob("unlearning.json")
    }


def test_what_the_adapter_does_not_touch_stays_in_half_precision(half_base, run, tmp_path):
    run_siss("fuse", str(run), "--base", str(half_base), "--output_dir", str(tmp_path / "fused"), "--scale", "0.5")
    before, after = load_file(half_base / UNET_FILE), load_file(tmp_path / "fused" / UNET_FILE)
    adapter = load_file(run / LORA_FILE)
    touched = {name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in adapter if "lora_A" in name}
    assert before.keys() == after.keys() and len(touched) > 4
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        assert after[name].dtype == torch.float16
        if layer in touched and name.endswith(".weight"):
            down, up = (adapter[f"unet.{layer}.lora_{which}.weight"].flatten(1) for which in "AB")
            delta = 0.5 * (4 / 2) * (up @ down).view(weight.shape)
            assert torch.equal(after[name], (weight.float() + delta).half())
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)
    assert (tmp_path / "fused" / "LICENSE").read_text() == "A licence"


def test_it_may_be_published(base, run, tmp_path, capsys):
    run_siss("fuse", str(run), "--base", str(base), "--output_dir", str(tmp_path / "fused"))
    run_siss("push", str(tmp_path / "fused"), "--dry_run", "--base_model", "someone/base")
    printed = capsys.readouterr().out
    assert UNET_FILE in printed and "README.md" in printed and LORA_FILE not in printed


def test_bad_input_is_one_sentence_and_nothing_is_left(base, run, tmp_path, capfd):
    out = tmp_path / "fused"
    assert "--base is needed" in siss_error(capfd, "fuse", str(run), "--output_dir", str(out))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    adapter = load_file(run / LORA_FILE)
    flags = ("--base", str(base), "--output_dir", str(out))
    names = sorted(adapter)
    for tensors, says in (
        ({name.replace("unet.", "text_encoder."): tensor for name, tensor in adapter.items()}, "does not fit"),
        ({name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in adapter.items()}, "does not fit"),
        (adapter | {names[0].replace("unet.", "unet.nowhere."): adapter[names[0]].clone()}, "does not fit"),
    ):
        save_file(tensors, other / LORA_FILE)
        assert says in siss_error(capfd, "fuse", str(other), *flags)
    (other / LORA_FILE).unlink()
    assert "neither an adapter nor a pipeline" in siss_error(capfd, "fuse", str(other), *flags)
    assert not out.exists()
    out.mkdir()
    (out / "a.txt").write_text("mine")
    assert "not empty" in siss_error(capfd, "fuse", str(run), *flags)
    assert [file.name for file in out.iterdir()] == ["a.txt"]

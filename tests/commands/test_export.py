"""`siss export`: what other programs make of the file is what was trained."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from siss_diffusers.exporting import Adapter, write
from siss_diffusers.settings import AdapterSettings
from siss_diffusers.storage.files import LORA_FILE
from siss_diffusers.training.adapters import add_lora, save_lora
from tests.helpers.commands import run_siss, siss_error
from tests.helpers.tiny_flux import build_pipeline as build_flux
from tests.helpers.tiny_sd import predict, save_pipeline


RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base"))


def save_adapter(network, folder, pipeline_class, name, targets) -> None:
    torch.manual_seed(1)
    add_lora(network, AdapterSettings(RANK, ALPHA, 0.0, targets), torch.float32)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    save_lora(network, folder, pipeline_class, name)
    (folder / "unlearning.json").write_text("{}")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    save_adapter(unet, folder, StableDiffusionPipeline, "unet", ("to_q", "to_out.0", "conv1", "time_emb_proj"))
    return folder


def deltas(run, network_name: str) -> dict[str, torch.Tensor]:
    """What is added to each layer, from the file of the run."""
    tensors = load_file(run / LORA_FILE)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    factors = {name: [tensors[f"{name}.lora_{which}.weight"].flatten(1) for which in "BA"] for name in layers}
    return {name.removeprefix(f"{network_name}."): ALPHA / RANK * (up @ down) for name, (up, down) in factors.items()}


def as_comfyui_reads(file, network, prefixes: dict[str, bool]) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each layer: its map of keys for diffusers names, and its rule that the scale is `alpha / rank`.

    Args:
        prefixes: of the keys, and whether dots in the name of a layer are underscores there.
    """
    keys = {
        prefix + (name.replace(".", "_") if flat else name): name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for prefix, flat in prefixes.items()
    }
    tensors, found, used = load_file(file), {}, set()
    for key, name in keys.items():
        for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            if key + up in tensors:
                names = [key + up, key + down, f"{key}.alpha"]
                up_factor, down_factor = (tensors[part].flatten(1) for part in names[:2])
                found[name] = tensors[names[2]].item() / len(down_factor) * (up_factor @ down_factor)
                used |= set(names)
    assert used == set(tensors)  # "lora key not loaded"
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 5
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta)


@pytest.mark.parametrize("kind", ["kohya", "comfyui"])
def test_a_unet_is_the_same_in_comfyui(kind, base, run, tmp_path):
    run_siss("export", str(run), "--format", kind, "--output_dir", str(tmp_path / "out"))
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    found = as_comfyui_reads(tmp_path / "out" / f"{run.name}.safetensors", unet, {"lora_unet_": True})
    assert_same(found, deltas(run, "unet"))


def test_diffusers_reads_the_file_of_kohya(base, tmp_path):
    """Its converter knows attention layers only."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    save_adapter(pipeline.unet, tmp_path, StableDiffusionPipeline, "unet", ("to_q", "to_k", "to_v", "to_out.0"))
    wanted = predict(pipeline.unet)
    run_siss("export", str(tmp_path), "--format", "kohya", "--output_dir", str(tmp_path / "out"))
    other = StableDiffusionPipeline.from_pretrained(base)
    before = predict(other.unet)
    other.load_lora_weights(tmp_path / "out", weight_name=f"{tmp_path.name}.safetensors")
    torch.testing.assert_close(predict(other.unet), wanted)
    assert (wanted - before).abs().max() > 0.01


def test_a_transformer_is_the_same_in_comfyui(tmp_path):
    pipeline = build_flux()
    config, kind = pipeline.transformer.config, type(pipeline)
    save_adapter(pipeline.transformer, tmp_path, kind, "transformer", ("to_q", "to_k", "proj_out"))
    run_siss("export", str(tmp_path), "--format", "comfyui", "--output_dir", str(tmp_path / "out"))
    file = tmp_path / "out" / f"{tmp_path.name}.safetensors"
    found = as_comfyui_reads(file, FluxTransformer2DModel.from_config(config), {"transformer.": False})
    assert_same(found, deltas(tmp_path, "transformer"))


def test_peft_reads_its_folder(base, run, tmp_path):
    run_siss("export", str(run), "--format", "peft", "--output_dir", str(tmp_path / "out"))
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(run))
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    torch.testing.assert_close(predict(PeftModel.from_pretrained(unet, tmp_path / "out")), predict(pipeline.unet))


def test_bad_input_is_one_sentence_and_nothing_is_left(base, run, tmp_path, capfd):
    out = tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    (other / "unlearning.json").write_text(json.dumps({}))
    flags = ("--format", "kohya", "--output_dir", str(out))
    save_file(load_file(run / LORA_FILE), other / LORA_FILE)  # without the metadata
    assert "its scale is not known" in siss_error(capfd, "export", str(other), *flags)
    assert "unlearning.json" in siss_error(capfd, "export", str(tmp_path), *flags)
    assert not out.exists()
    with pytest.raises(ValueError, match="use --format comfyui"):
        write(Adapter("transformer", {}, {"lora_alpha": 1}), "kohya", tmp_path, "a")

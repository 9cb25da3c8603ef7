"""Models that somebody else wrote: no pickle is read and no code is run."""

import argparse
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

import train_siss_sd
import train_siss_unconditional
from siss_diffusers.assets.make_tiny_sd import make_tokenizer
from siss_diffusers.families import NamedPipeline, find_family
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.families.trust import is_adapter
from siss_diffusers.metrics.clip import Clip
from siss_diffusers.metrics.features import load_torchscript
from tests.helpers.commands import assert_refused, siss_error
from tests.helpers.paths import TINY_MODEL
from tests.helpers.untrusted import code, refusal


pytestmark = pytest.mark.usefixtures("no_network", "no_waiting")


def load_pipeline(name: str, flag: str, adapter: str | None = None, adapter_flag: str = "--adapter"):
    source = NamedPipeline(name, flag)
    family = find_family(source, with_prompts=True).from_source(source)
    return load_for_sampling(source, family, "cpu", torch.float32, adapter, adapter_flag)


class Payload:
    """Runs where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sd_flags(model: Path, *more: str) -> list[str]:
    return ["audit", "--pretrained_model_name_or_path", str(model), "--prompts", "a", "--guidance_scale", "2", *more]


def sd_args(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"cache_dir": None, "dtype": "float32"} | values)


class TestModels:
    @pytest.fixture
    def model(self, pipeline_folder, tmp_path):
        return shutil.copytree(pipeline_folder, tmp_path / "model")

    @pytest.fixture
    def unconditional(self, tmp_path):
        return shutil.copytree(TINY_MODEL, tmp_path / "model")

    @pytest.fixture
    def clip(self, tmp_path):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        config = CLIPConfig(text_config=small | {"vocab_size": 600}, vision_config=small | {"image_size": 32})
        CLIPModel(config).save_pretrained(tmp_path / "clip")
        make_tokenizer(("a photograph",)).save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def pickle_weights(self, folder: Path, marker: Path, name: str = "pytorch_model.bin") -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        torch.save(Payload(marker), folder / name)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_pickles_are_refused_before_anything_is_loaded(self, model, marker, tmp_path, capfd, base_args, part):
        self.pickle_weights(model / part, marker)
        flags = base_args | {"--pretrained_model_name_or_path": str(model)}
        hint = f"--pretrained_model_name_or_path: {model} holds its weights as pickles (pytorch_model.bin)"
        assert_refused(train_siss_sd.main, flags, hint, tmp_path, capfd)
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert hint in message and "safe_serialization=True" in message

    def test_pickles_of_an_unconditional_model(self, unconditional, marker, tmp_path, capfd, base_args):
        self.pickle_weights(unconditional / "unet", marker, "diffusion_pytorch_model.bin")
        flags = base_args | {"--pretrained_model_name_or_path": str(unconditional)}
        assert_refused(train_siss_unconditional.main, flags, "safetensors", tmp_path, capfd)
        message = siss_error(
            *(capfd, "evaluate", "--base", str(unconditional), "--unlearned", str(TINY_MODEL)),
            *("--train_data_dir", base_args["--train_data_dir"], "--output_dir", str(tmp_path / "out")),
        )
        assert f"--base: {unconditional} holds its weights as pickles (diffusion_pytorch_model.bin)" in message

    def test_a_pickle_by_itself(self, marker, tmp_path, capfd):
        torch.save(Payload(marker), tmp_path / "v1-5.ckpt")
        message = siss_error(capfd, *sd_flags(tmp_path / "v1-5.ckpt", "--output_dir", str(tmp_path / "out")))
        assert "holds its weights as pickles (v1-5.ckpt)" in message

    def test_a_pickle_beside_safetensors_of_another_variant(self, model, marker):
        """The folder has safetensors, but not those that are asked for: no falling back."""
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
        torch.save(Payload(marker), weights.with_suffix(".bin"))
        message = refusal(load_pipeline, str(model), "--base")
        assert message.startswith(f"--base: {model} cannot be loaded") and "pickles are not read" in message

    def test_a_checkpoint_of_all_formats_is_loaded_from_safetensors(self, model, marker):
        torch.save(Payload(marker), model / "v1-5.ckpt")
        torch.save(Payload(marker), model / "unet" / "diffusion_pytorch_model.bin")
        assert load_pipeline(str(model), "--base").unet is not None

    def test_a_pickled_adapter(self, model, marker, tmp_path, capfd):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        torch.save(Payload(marker), adapter / "pytorch_lora_weights.bin")
        flags = sd_flags(model, "--adapter", str(adapter), "--output_dir", str(tmp_path / "audit"))
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])  # a base that is loaded first would be what is complained of
        assert f"--adapter: {adapter} holds its weights as pickles" in siss_error(capfd, *flags)
        weights.write_bytes(whole)
        assert "--unlearned" in refusal(is_adapter, str(adapter), "--unlearned")
        (adapter / "other.safetensors").write_bytes(b"")  # not enough to fall back on a pickle
        message = refusal(load_pipeline, str(model), "--base", str(adapter), "--unlearned")
        assert message.startswith(f"--unlearned: {adapter} cannot be loaded")

    def test_a_pickled_network_and_clip(self, marker, clip, tmp_path):
        torch.save(Payload(marker), tmp_path / "sscd.pt")
        assert "not a TorchScript file" in refusal(load_torchscript, tmp_path / "sscd.pt", "--copy_detector")
        self.pickle_weights(clip, marker)
        assert "--clip_model" in refusal(Clip, str(clip), torch.device("cpu"), "--clip_model")

    @pytest.mark.parametrize("kind", ["pipeline", "component", "module", "none"])
    def test_code_beside_a_pipeline_is_not_run(self, model, marker, tmp_path, capfd, base_args, kind):
        if kind == "pipeline":
            (model / "mine.py").write_text(code(marker))
            edit_json(model / "model_index.json", _class_name=["mine", "StableDiffusionPipeline"])
        elif kind == "component":
            (model / "unet" / "mine.py").write_text(code(marker))
            edit_json(model / "model_index.json", unet=["mine", "UNet2DConditionModel"])
        elif kind == "module":
            edit_json(model / "model_index.json", unet=["os", "system"])
        else:  # diffusers takes it for the pipeline that was not named
            (model / "None.py").write_text(code(marker))
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert "--pretrained_model_name_or_path" in message and "which is never run" in message
        flags = base_args | {"--pretrained_model_name_or_path": str(model)}
        if kind != "none":
            assert_refused(train_siss_sd.main, flags, "which is never run", tmp_path, capfd)

    def test_code_beside_an_unconditional_model_is_not_run(self, unconditional, marker, tmp_path, capfd, base_args):
        (unconditional / "unet" / "mine.py").write_text(code(marker))
        edit_json(unconditional / "model_index.json", unet=["mine", "UNet2DModel"])
        flags = base_args | {"--pretrained_model_name_or_path": str(unconditional)}
        assert_refused(train_siss_unconditional.main, flags, "code", tmp_path, capfd)

    def test_an_auto_map_is_ignored(self, model, marker):
        for part in ("text_encoder", "tokenizer"):
            (model / part / "mine.py").write_text(code(marker))
        classes = ("AutoConfig", "AutoModel", "CLIPTextModel")
        edit_json(model / "text_encoder" / "config.json", auto_map={name: f"mine.{name}" for name in classes})
        edit_json(model / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.A", "mine.B"]})
        assert isinstance(load_pipeline(str(model), "--base").text_encoder, CLIPTextModel)

    def test_nobody_is_asked_whether_to_run_the_code_of_a_clip(self, clip, marker, monkeypatch):
        (clip / "mine.py").write_text(code(marker))
        edit_json(clip / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.CLIPConfig"})
        config = {"auto_map": {"AutoTokenizer": [None, "mine.CLIPTokenizer"]}, "tokenizer_class": "Mine"}
        (clip / "tokenizer_config.json").write_text(json.dumps(config))
        monkeypatch.setattr(builtins, "input", lambda _: "y")
        message = refusal(Clip, str(clip), torch.device("cpu"), "--clip_model")
        assert message.startswith(f"--clip_model: {clip} brings code of its own")

    BROKEN = {
        "no object": ("model_index.json", b"[1]"),
        "no class": ("model_index.json", b"{}"),
        "no text": ("model_index.json", b"\xff\xfe"),
        "no UNet": ("unet/config.json", b"{}"),
        "no JSON": ("vae/config.json", b"{"),
        "a short header": ("text_encoder/model.safetensors", b"\x08"),
        "a header that lies": ("unet/diffusion_pytorch_model.safetensors", b"\xff" * 64),
        "no tokenizer": ("tokenizer/tokenizer.json", b"{}"),
    }

    @pytest.mark.parametrize("case", BROKEN)
    def test_broken_files_end_in_a_sentence(self, model, tmp_path, capfd, case):
        file, content = self.BROKEN[case]
        (model / file).write_bytes(content)
        message = siss_error(capfd, *sd_flags(model, "--output_dir", str(tmp_path / "out")))
        assert f"--pretrained_model_name_or_path: {model}" in message

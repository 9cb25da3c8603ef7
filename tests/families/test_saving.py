"""What is saved is the base with changed weights, and nothing else."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

import train_siss_sd
import train_siss_unconditional
from siss_diffusers import unlearn
from siss_diffusers.families import NamedPipeline
from siss_diffusers.families.saving import copy_rest, left_behind
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import TINY_MODEL


TEXTS = {"unet/about.md"}
# What holds the old weights, or may hold pictures or captions of the training set or code, and what is of another run.
LEFT_BEHIND = {
    *("v1-4.ckpt", "whole.safetensors", "vae/diffusion_pytorch_model.bin", "unet/model.non_ema.safetensors"),
    *(
        "assets/sample.json",
        "v1-variants.png",
        "vae/sample.png",
        "data.parquet",
        "run.py",
        "vae/run.py",
        "LICENSE.png",
    ),
    *("captions.txt", "prompts.json", "curation.json", "metadata.jsonl", "v1-inference.yaml", "about.md"),
    *("README.md", "receipt.json", "unlearning.json", "near_duplicates.csv", "evaluation.json", "train_log.jsonl"),
}


@pytest.fixture(scope="module")
def checked(pipeline_folder, tmp_path_factory) -> Path:
    """A pipeline with a safety checker, saved in half precision, with files that no library writes."""
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=tiny | {"image_size": 32, "patch_size": 16},
        text_config=tiny | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        projection_dim=8,
    )
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    parts = pipeline.components | {
        "safety_checker": StableDiffusionSafetyChecker(config),
        "feature_extractor": CLIPImageProcessor(),
    }
    folder = tmp_path_factory.mktemp("checked") / "base"
    StableDiffusionPipeline(**parts).to(torch.float16).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"a_later_setting": True}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    for name in ("vae/config.json", "unet/config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
    (folder / "LICENSE.md").write_text("Free.")
    (folder / "LICENSE").write_text("Free.")
    for name in TEXTS:
        (folder / name).write_text(f"{name} of the base")
    (folder / "assets").mkdir()
    for name in LEFT_BEHIND - {"vae/diffusion_pytorch_model.bin"}:
        (folder / name).write_text(f"{name} of the base")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return folder


def digests(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


NETWORK = "unet/diffusion_pytorch_model.safetensors"
OF_THE_RUN = {"unlearning.json", "train_log.jsonl", "receipt.json"}


def test_every_file_but_the_network_comes_back(checked, full_args, tmp_path, caplog):
    caplog.set_level("INFO")
    train_siss_sd.main(to_argv(full_args | {"--pretrained_model_name_or_path": str(checked)}))
    before, after = digests(checked), digests(tmp_path / "out")
    assert (
        before.keys() - LEFT_BEHIND == after.keys() - OF_THE_RUN and TEXTS | {"LICENSE", "LICENSE.md"} <= after.keys()
    )
    changed = {name for name in before.keys() - LEFT_BEHIND if before[name] != after[name]}
    assert changed == {NETWORK}
    assert all(before[name] != after[name] for name in OF_THE_RUN & before.keys())
    index = json.loads((checked / "model_index.json").read_text())
    named = {name.replace("assets/", "assets/sample.json") for name in left_behind(checked, index, "unet")}
    assert named == LEFT_BEHIND and "not copied into the result: LICENSE.png, README.md, " in caplog.text
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.safety_checker is not None and pipeline.config.requires_safety_checker
    weights = load_file(tmp_path / "out" / NETWORK)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_scheduler_that_was_told_otherwise_is_the_one_that_is_saved(checked, full_args, tmp_path):
    flags = {"--pretrained_model_name_or_path": str(checked), "--prediction_type": "v_prediction"}
    train_siss_sd.main(to_argv(full_args | flags))
    saved = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    before, after = digests(checked), digests(tmp_path / "out")
    assert before["model_index.json"] == after["model_index.json"]


def test_a_variant_gets_the_plain_names(pipeline_folder, full_args, tmp_path, capfd):
    base = tmp_path / "fp16"
    StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float16).save_pretrained(base, variant="fp16")
    flags = full_args | {"--pretrained_model_name_or_path": str(base)}
    assert_refused(train_siss_sd.main, flags, "add --variant fp16", tmp_path, capfd)
    train_siss_sd.main(to_argv(flags | {"--variant": "fp16"}))
    before, after = digests(base), digests(tmp_path / "out")
    for name in before.keys() - {"unet/diffusion_pytorch_model.fp16.safetensors"}:
        assert after[name.replace(".fp16.", ".")] == before[name], name
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").text_encoder.dtype == torch.float16


def test_shards_of_a_variant_are_found_by_their_index(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shards = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (base / "text_encoder").mkdir(parents=True)
    (base / "unet").mkdir()
    (out / "unet").mkdir(parents=True)
    for name in (*shards, "model.safetensors.index.fp16.json"):
        (base / "text_encoder" / name).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    (base / "model_index.json").write_text("{}")
    copy_rest(base, {"text_encoder": ["a", "b"], "unet": ["a", "b"]}, "unet", out, "fp16")
    index = json.loads((out / "text_encoder/model.safetensors.index.json").read_text())
    assert all((out / "text_encoder" / shard).exists() for shard in index["weight_map"].values())
    assert not list((out / "unet").iterdir())


def test_a_base_that_needs_pickles_is_refused_before_training(checked, full_args, tmp_path, capfd):
    base = shutil.copytree(checked, tmp_path / "base")
    weights = base / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    flags = full_args | {"--pretrained_model_name_or_path": str(base)}
    hint = (
        f"--pretrained_model_name_or_path: safety_checker of {base} holds its weights as pickles (pytorch_model.bin)"
    )
    assert_refused(train_siss_sd.main, flags, hint, tmp_path, capfd)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_base_is_refused(checked, full_args, tmp_path, capfd):
    base = shutil.copytree(checked, tmp_path / "base")
    secret = tmp_path / "secret"
    secret.write_text("private")
    (base / "tokenizer" / "notes.json").symlink_to(secret)
    flags = full_args | {"--pretrained_model_name_or_path": str(base)}
    assert_refused(train_siss_sd.main, flags, "notes.json is a link out of", tmp_path, capfd)


def test_an_unconditional_pipeline_and_one_without_sub_folders(base_args, tmp_path):
    train_siss_unconditional.main(to_argv(base_args))
    before, after = digests(TINY_MODEL), digests(tmp_path / "out")
    kept = {name for name in before if name.endswith(".json")}
    assert kept and all(before[name] == after[name] for name in kept)

    flat, out = tmp_path / "flat", tmp_path / "flat_out"
    flat.mkdir()
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", NETWORK):
        shutil.copyfile(TINY_MODEL / name, flat / Path(name).name)
    flags = {"--pretrained_model_name_or_path": str(flat), "--output_dir": str(out)}
    train_siss_unconditional.main(to_argv(base_args | flags))
    assert digests(out)["scheduler/scheduler_config.json"] == before["scheduler/scheduler_config.json"]
    assert digests(out)[NETWORK] == after[NETWORK]


def test_python_keeps_the_safety_checker(checked, captioned_folder, cache_dir, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(checked)
    pictures = [Image.new("RGB", (16, 16), (index, 200 - index, 10)) for index in range(5)]
    pairs = [(picture, "a photograph") for picture in pictures]
    values = {"max_train_steps": 1, "train_batch_size": 2, "calibrate_forgetting": "off", "cache_dir": str(cache_dir)}
    outcome = unlearn(pipeline, pairs[:1], pairs[1:], output_dir=str(tmp_path / "written"), **values)
    outcome.save(tmp_path / "saved")
    for folder in (tmp_path / "written", tmp_path / "saved"):
        assert (folder / "safety_checker" / "model.safetensors").exists()
        assert json.loads((folder / "model_index.json").read_text())["requires_safety_checker"] is True
    assert digests(tmp_path / "written")[NETWORK] == digests(tmp_path / "saved")[NETWORK]


def fill_cache(cache: Path, base: Path, name: str, without: str = "-") -> Path:
    """Lay a pipeline out as a download of the Hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    for file in base.rglob("*"):
        if (
            file.is_file()
            and not file.relative_to(base).as_posix().startswith(without)
            and file.suffix == ".json"
            or (file.suffix == ".safetensors" and file.parent != base and file.parent.name != without)
        ):
            blob = repository / "blobs" / hashlib.sha256(str(file).encode()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_name_on_the_hub(checked, full_args, tmp_path):
    snapshot = fill_cache(tmp_path / "hub", checked, "someone/model")
    flags = {"--pretrained_model_name_or_path": "someone/model", "--cache_dir": str(tmp_path / "hub")}
    train_siss_sd.main(to_argv(full_args | flags))
    before, after = digests(snapshot), digests(tmp_path / "out")
    assert "safety_checker/model.safetensors" in before
    names = {name for name in before.keys() - LEFT_BEHIND if "/" in name} | {"model_index.json"}
    assert {name for name in names if before[name] != after[name]} == {NETWORK}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_download_that_is_not_whole_is_refused(checked, full_args, tmp_path, tmp_path_factory, capfd):
    hub = tmp_path_factory.mktemp("hub")
    fill_cache(hub, checked, "someone/model", without="safety_checker")
    flags = {"--pretrained_model_name_or_path": "someone/model", "--cache_dir": str(hub)}
    assert_refused(
        train_siss_sd.main, full_args | flags, "safety_checker of someone/model is not in the cache", tmp_path, capfd
    )


def test_the_network_of_a_repository_without_sub_folders(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", NETWORK):
        shutil.copyfile(TINY_MODEL / name, flat / Path(name).name)
    cache, repository = tmp_path / "hub", tmp_path / "hub" / "models--someone--flat"
    shutil.copytree(flat, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    source = NamedPipeline("someone/flat", cache_dir=str(cache))
    assert source.component_config("unet")["in_channels"] == 1

    class Holder:
        def register_modules(self, unet):
            self.unet = unet

    class Family:
        network_name = "unet"

    source.load_network(Family, holder := Holder())
    assert holder.unet.config.in_channels == 1

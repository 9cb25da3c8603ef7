"""Every refusal names the cause and the cure, before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from siss_diffusers.errors import UsageError
from siss_diffusers.families import LoadedPipeline, NamedPipeline, find_family
from siss_diffusers.families.causes import cause_on_the_hub, variants_in
from siss_diffusers.families.loading import load_for_sampling
from siss_diffusers.flags import parse_settings
from siss_diffusers.settings import TextToImageSettings, UnconditionalSettings
from siss_diffusers.storage.folders import made_folder
from tests.helpers.commands import siss_error
from tests.helpers.tiny_sd import build_pipeline


def refusal(name: object, **options) -> str:
    with pytest.raises(UsageError) as info:
        find_family(NamedPipeline(str(name), "--model", **options))
    assert str(info.value).startswith("--model: ")
    return str(info.value)


def test_a_single_file_is_converted(tmp_path):
    file = tmp_path / "v1-5.safetensors"
    file.write_bytes(b"")
    words = f"StableDiffusionPipeline.from_single_file({str(file)!r}).save_pretrained('v1-5')"
    assert words in refusal(file)
    assert words in refusal(tmp_path)
    (tmp_path / "my_lora.safetensors").write_bytes(b"")
    assert "is an adapter" in refusal(tmp_path / "my_lora.safetensors")
    (tmp_path / "notes.txt").write_text("")
    assert "name the folder of a pipeline" in refusal(tmp_path / "notes.txt")


def test_other_things_than_a_pipeline(pipeline_folder, tmp_path):
    assert f"name the whole, {pipeline_folder}" in refusal(pipeline_folder / "unet")
    assert f"but {pipeline_folder} does" in refusal(pipeline_folder.parent)
    assert "is a UNet2DConditionModel alone" in refusal(shutil.copytree(pipeline_folder / "unet", tmp_path / "unet"))
    address = "https://huggingface.co/CompVis/stable-diffusion-v1-4/tree/main"
    assert refusal(address).endswith("name the repository, CompVis/stable-diffusion-v1-4")
    for name in ("./gone", "/gone/x", "a/b/c", "~nobody/x", "", "/" + 5_000 * "a"):
        assert "there is no folder" in refusal(name)
    (tmp_path / "empty").mkdir()
    assert "it holds no model_index.json" in refusal(tmp_path / "empty")


def test_a_name_that_is_not_in_the_cache():
    message = refusal("someone/nothing")
    assert (
        "not in the cache, and HF_HUB_OFFLINE is set; unset it" in message
        and "`hf download someone/nothing`" in message
    )


def test_what_the_hub_says(monkeypatch):
    class Response:
        status_code, headers, request, text, url = 403, {}, None, "", ""

    def wrapped(kind):
        try:
            try:
                raise kind("no", response=Response())
            except Exception as cause:
                raise OSError("something else") from cause
        except OSError as error:
            return cause_on_the_hub(error, "someone/model")

    assert "https://huggingface.co/someone/model" in wrapped(GatedRepoError)
    assert "--revision" in wrapped(RevisionNotFoundError)
    assert "`hf auth login`" in wrapped(RepositoryNotFoundError)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "the Hub cannot be reached" in cause_on_the_hub(ConnectionError(), "someone/model")
    assert cause_on_the_hub(ValueError("a broken file"), "someone/model") is None


def test_variants_are_told_from_file_names():
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema-00001-of-00002.safetensors",
    ]
    names += ["diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "other.fp16.safetensors", "model.fp16.bin"]
    assert variants_in(names) == {None, "fp16", "non_ema", "bf16"}
    assert variants_in(["model-00001-of-00002.safetensors"]) == {None}


def test_variants(pipeline_folder, tmp_path, capfd):
    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float16).save_pretrained(half, variant="fp16")
    assert refusal(half).endswith("add --variant fp16")
    assert "has no variant bf16, only fp16" in refusal(half, variant="bf16")
    assert "drop --variant" in refusal(pipeline_folder, variant="fp16")
    assert find_family(NamedPipeline(str(half), variant="fp16"))
    out = str(tmp_path / "audit")
    flags = ["--prompts", "a", "--num_samples", "2", "--num_inference_steps", "2", "--output_dir", out]
    message = siss_error(capfd, "audit", "--pretrained_model_name_or_path", str(half), *flags)
    assert "add --variant fp16" in message and not Path(out).exists()


@pytest.mark.parametrize("scheduler", ["flow", "flow sigmas", "unknown prediction"])
def test_schedulers_of_other_models(pipeline_folder, tmp_path, scheduler):
    pipeline = build_pipeline()
    if scheduler == "flow":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    elif scheduler == "flow sigmas":
        pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    else:
        pipeline.scheduler = EulerDiscreteScheduler(prediction_type="epsilon")
        pipeline.scheduler.register_to_config(prediction_type="velocity")
    pipeline.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"not read")
    message = refusal(tmp_path / "model")
    assert f"has the scheduler {type(pipeline.scheduler).__name__}" in message and "DDPMScheduler" in message
    with pytest.raises(UsageError, match="pipeline: "):
        find_family(LoadedPipeline(pipeline))


def test_a_class_that_diffusers_does_not_have(pipeline_folder, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text()) | {"scheduler": ["diffusers", "LaterScheduler"]}
    (model / "model_index.json").write_text(json.dumps(index))
    assert "is a LaterScheduler, which diffusers" in refusal(model)


@pytest.mark.parametrize("component", ["unet", "vae", "scheduler", "tokenizer", "text_encoder"])
def test_a_part_that_is_missing_is_named(component, pipeline_folder, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    shutil.rmtree(model / component)
    assert f"holds no folder {component}, which its model_index.json names" in refusal(model)
    index = json.loads((model / "model_index.json").read_text())
    for value in ({component: [None, None]}, {}):
        index.pop(component, None)
        (model / "model_index.json").write_text(json.dumps(index | value))
        assert f"names no {component}, which Stable Diffusion 1.x or 2.x needs" in refusal(model)


def test_a_part_that_is_missing_in_memory_is_named():
    pipeline = build_pipeline()
    pipeline.vae = None
    pipeline.register_to_config(vae=(None, None))
    with pytest.raises(UsageError, match="pipeline: .* names no vae"):
        find_family(LoadedPipeline(pipeline))


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_weights_that_are_missing_are_named(component, pipeline_folder, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    file = model / component / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != gone}, file, {"format": "pt"})
    source = NamedPipeline(str(model), "--model")
    family = find_family(source).from_source(source)

    def load_for_training():
        family_pipeline = source.load_without_network(family)
        source.load_network(family, family_pipeline)

    for load in (load_for_training, lambda: load_for_sampling(source, family, "cpu")):
        with pytest.raises(
            UsageError, match=f"--model: the files of {component} in .* lack 1 weights, such as {gone}"
        ):
            load()


def test_a_tokenizer_without_a_limit(pipeline_folder, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    file = model / "tokenizer" / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "model_max_length"}
    file.write_text(json.dumps(config))
    source = NamedPipeline(str(model), "--model")
    family = find_family(source).from_source(source)
    with pytest.raises(UsageError, match='tokenizer_config.json, where "model_max_length" must be'):
        family.token_ids(source.load_without_network(family), ["a photograph"])


PATHS = ("train_data_dir", "output_dir", "cache_dir", "resume_from_checkpoint", "forget_data_dir", "dataset_name")


@pytest.mark.parametrize("kind", [UnconditionalSettings, TextToImageSettings])
@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_means_home(monkeypatch, tmp_path, kind, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse_settings(kind, "", ["--pretrained_model_name_or_path=~/model", f"--{name}=~/x"])
    assert settings.pretrained_model_name_or_path == str(tmp_path / "model")
    assert getattr(settings, name) == str(tmp_path / "x")
    assert getattr(kind.from_values({name: "~/x"}), name) == str(tmp_path / "x")
    assert settings.tracker_project_name == kind.from_values({}).tracker_project_name


def test_a_tilde_in_the_commands(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for command, flag in (("audit", "--pretrained_model_name_or_path"), ("curate", "--pretrained_model_name_or_path")):
        message = siss_error(capfd, command, f"{flag}=~/gone", "--prompts=a", f"--output_dir={tmp_path}/out")
        assert f"there is no folder {tmp_path}/gone" in message
    flags = ["--unlearned=~/u", "--train_data_dir=~/t", "--forget_files=a", f"--output_dir={tmp_path}/out"]
    assert f"--base: there is no folder {tmp_path}/b" in siss_error(capfd, "evaluate", "--base=~/b", *flags)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_made_early_and_gone_where_the_work_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="later"), made_folder("--output_dir", tmp_path / "mine/new/out"):
        assert (tmp_path / "mine/new/out").is_dir()
        raise UsageError("later")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())
    with pytest.raises(UsageError), made_folder("--output_dir", tmp_path / "mine"):
        raise UsageError("later")
    assert (tmp_path / "mine").is_dir()
    with pytest.raises(KeyError), made_folder("--output_dir", tmp_path / "kept"):
        (tmp_path / "kept" / "file").write_text("")
        raise KeyError
    assert (tmp_path / "kept" / "file").exists()
    with made_folder("--output_dir", tmp_path / "done"):
        pass
    assert (tmp_path / "done").is_dir()


@pytest.mark.parametrize("command", ["audit", "curate", "evaluate"])
def test_the_commands_find_a_folder_that_cannot_be_made_first(command, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    flags = ["--base=gone/x", "--unlearned=x", "--train_data_dir=x", "--forget_files=a"]
    if command != "evaluate":
        flags = ["--pretrained_model_name_or_path=gone/x", "--prompts=a"]
    message = siss_error(capfd, command, *flags, f"--output_dir={tmp_path}/file/out")
    assert message.startswith("siss: error: --output_dir: ") and "cannot be made" in message

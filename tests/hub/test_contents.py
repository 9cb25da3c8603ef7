"""Which files of a run may be published: real pipelines, and everything that may lie beside their files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from siss_diffusers.assets.make_tiny_sd import make_tokenizer
from siss_diffusers.errors import UsageError
from siss_diffusers.hub.contents import (
    list_model_files,
    model_uploads,
    public_file_names,
    read_components,
    read_run,
    weights_digest,
)
from siss_diffusers.storage.files import LORA_FILE


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "projection_dim": 8,
}
CLUTTER = (
    "jane.png",
    "receipt.json",
    "near_duplicates.csv",
    "train_log.jsonl",
    "metadata.jsonl",
    "prompts.txt",
    "evaluation.json",
    "model.safetensors",
    "jane.safetensors",
    "checkpoint-2/state.json",
    "checkpoint-2/unet/diffusion_pytorch_model.safetensors",
    "logs/events.out.tfevents.1",
    "{}/jane.png",
    "{}/metadata.jsonl",
    "{}/prompts.txt",
    "{}/jane.json",
    "{}/jane_config.json",
    "{}/config.json.orig",
    "{}/jane.safetensors",
    "{}/diffusion_pytorch_model_jane.safetensors",
    "{}/diffusion_pytorch_model.jane.safetensors",
    "{}/diffusion_pytorch_model-jane.safetensors",
    "{}/model_jane.safetensors",
    "{}/model.jane.safetensors",
    "{}/optimizer.bin",
    "{}/diffusion_pytorch_model.bin",
    "{}/pictures/config.json",
    "{}/pictures/diffusion_pytorch_model.safetensors",
    "{}/pictures/model.safetensors",
)


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, layers_per_block=1)


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Pipelines of three families, saved by diffusers: with a safety checker, with two text encoders, in shards."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = make_tokenizer(("a photograph",))
    text = CLIPTextConfig(vocab_size=len(tokenizer), **SMALL)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **SMALL)
    checker = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    parts = {"vae": small_vae(), "unet": small_unet(), "scheduler": EulerDiscreteScheduler(), "tokenizer": tokenizer}
    StableDiffusionPipeline(
        **parts,
        text_encoder=CLIPTextModel(text),
        safety_checker=StableDiffusionSafetyChecker(checker),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder / "sd")
    StableDiffusionXLPipeline(
        **parts,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
    ).save_pretrained(folder / "sdxl")
    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, norm_num_groups=2
    )
    DiTPipeline(transformer=transformer, vae=small_vae(), scheduler=DDIMScheduler()).save_pretrained(
        folder / "dit", max_shard_size="8kB"
    )
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A finished run with a transformer."""
    shutil.copytree(saved / "dit", tmp_path / "run")
    (tmp_path / "run" / "unlearning.json").write_text("{}")
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_model_files(folder)]


def set_component(folder: Path, name: str, value: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: value}))


class TestPipelines:
    @pytest.mark.parametrize("kind", ["sd", "sdxl", "dit"])
    def test_everything_that_diffusers_saves_is_published_and_loads_again(self, kind, saved, tmp_path):
        everything = sorted(p.relative_to(saved / kind).as_posix() for p in (saved / kind).rglob("*") if p.is_file())
        assert sorted(names(saved / kind)) == everything
        for upload in model_uploads(saved / kind):
            path = tmp_path / upload.path_in_repo
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(upload.source if isinstance(upload.source, bytes) else upload.source.read_bytes())
        DiffusionPipeline.from_pretrained(tmp_path)

    def test_the_cases_are_what_they_claim(self, saved):
        assert "safety_checker/model.safetensors" in names(saved / "sd")
        assert "feature_extractor/preprocessor_config.json" in names(saved / "sd")
        assert {"text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"} <= set(names(saved / "sdxl"))
        assert "transformer/diffusion_pytorch_model.safetensors.index.json" in names(saved / "dit")
        assert sum("-of-" in name for name in names(saved / "dit")) > 1

    @pytest.mark.parametrize("kind", ["sd", "sdxl", "dit"])
    def test_whatever_else_lies_in_the_folder_stays(self, kind, saved, tmp_path):
        folder = shutil.copytree(saved / kind, tmp_path / "run")
        before = names(folder)
        for component in [*read_components(folder), "jane", "text_encoder_3"]:
            for name in CLUTTER:
                path = folder / name.format(component)
                path.parent.mkdir(exist_ok=True, parents=True)
                path.write_text("jane")
        assert names(folder) == before

    def test_a_folder_without_a_pipeline_publishes_the_adapter_only(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "run")
        (folder / "model_index.json").unlink()
        (folder / LORA_FILE).write_bytes(b"")
        assert names(folder) == [LORA_FILE]

    def test_a_component_that_the_pipeline_does_without(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "run")
        set_component(folder, "safety_checker", [None, None])
        assert not [name for name in names(folder) if name.startswith("safety_checker")]

    def test_weights_of_half_precision(self, run):
        for path in (run / "vae").glob("*.safetensors*"):
            path.unlink()
        (run / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
        assert "vae/diffusion_pytorch_model.fp16.safetensors" in names(run)


@pytest.mark.parametrize(
    ("library", "class_name", "published", "private"),
    [
        ("diffusers", "UNet2DModel", "config.json", "scheduler_config.json"),
        ("diffusers", "FlowMatchEulerDiscreteScheduler", "scheduler_config.json", "config.json"),
        ("transformers", "T5TokenizerFast", "spiece.model", "config.json"),
        ("transformers", "Qwen2Tokenizer", "chat_template.jinja", "model.safetensors"),
        ("transformers", "SiglipImageProcessorFast", "preprocessor_config.json", "tokenizer.json"),
        ("transformers", "PixtralProcessor", "processor_config.json", "model.safetensors"),
        ("transformers", "T5EncoderModel", "model-00001-of-00002.safetensors", "tokenizer.json"),
        ("transformers", "Mistral3ForConditionalGeneration", "generation_config.json", "tokenizer.json"),
    ],
)
def test_a_component_goes_up_by_its_kind(library, class_name, published, private, tmp_path):
    for name in (published, private, "config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_text("{}")
    (tmp_path / "part" / "diffusion_pytorch_model.safetensors").write_text("")
    (tmp_path / "model_index.json").write_text(json.dumps({"part": [library, class_name]}))
    assert f"part/{published}" in names(tmp_path) and f"part/{private}" not in names(tmp_path)
    assert public_file_names(library, class_name)


class TestRefused:
    @pytest.mark.parametrize("name", ["..", "../data", "vae/..", "/etc", "jane doe", "unet.old", "", "jane\n", "é"])
    def test_an_odd_name_of_a_component(self, name, run):
        set_component(run, name, ["diffusers", "AutoencoderKL"])
        with pytest.raises(UsageError, match="is not the name of a component"):
            list_model_files(run)

    @pytest.mark.parametrize(
        "value",
        [
            ["pipeline", "MyVAE"],
            ["os", "PathLike"],
            ["diffusers.pipelines.dit", "DiTPipeline"],
            ["", "X"],
            ["diffusers", None],
            ["diffusers"],
            ["diffusers", "AutoencoderKL", "jane"],
            [["diffusers"], "X"],
        ],
        ids=str,
    )
    def test_a_class_of_another_library(self, value, run):
        set_component(run, "vae", value)
        with pytest.raises(UsageError, match="vae is not a class of diffusers or transformers"):
            list_model_files(run)

    @pytest.mark.parametrize(
        "file", ["model_index.json", "vae/config.json", "transformer", "unlearning.json", "README.md"]
    )
    def test_a_symbolic_link(self, file, run, tmp_path):
        (run / "README.md").write_text("mine")
        (run / file).rename(tmp_path / "elsewhere")
        (run / file).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match=f"{file} is a symbolic link"):
            read_run(run, None, None)

    def test_a_broken_symbolic_link(self, run, tmp_path):
        (run / "vae" / "config.json").unlink()
        (run / "vae" / "config.json").symlink_to(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="vae/config.json is a symbolic link"):
            list_model_files(run)

    def test_a_link_under_another_name_just_stays(self, run):
        before = names(run)
        (run / "vae" / "jane.json").symlink_to(run / "vae" / "config.json")
        (run / "jane").symlink_to(run / "vae")
        assert names(run) == before

    def test_a_component_without_weights(self, run):
        for path in (run / "vae").glob("*.safetensors"):
            path.rename(path.with_suffix(".bin"))
        with pytest.raises(UsageError, match="vae holds no .safetensors file, which AutoencoderKL needs"):
            read_run(run, None, None)

    def test_a_scheduler_without_its_configuration(self, run):
        shutil.rmtree(run / "scheduler")
        with pytest.raises(UsageError, match="scheduler holds no .json file, which DDIMScheduler needs"):
            list_model_files(run)

    @pytest.mark.parametrize("content", ["[]", "null", '"jane"', "{"])
    def test_json_that_is_no_object(self, content, run):
        (run / "model_index.json").write_text(content)
        with pytest.raises(UsageError, match="model_index.json cannot be read"):
            list_model_files(run)


def test_configurations_go_up_without_the_paths_of_this_machine(run):
    config = json.loads((run / "vae" / "config.json").read_text())
    secret = {"_name_or_path": "/home/jane"}
    nested = {"text_config": secret | {"layers": 1}, "parts": [secret | {"width": 2}]}
    (run / "vae" / "config.json").write_text(json.dumps(config | secret | nested))
    set_component(run, "_name_or_path", "/home/jane")
    uploads = {upload.path_in_repo: upload.source for upload in model_uploads(run)}
    assert json.loads(uploads["vae/config.json"]) == config | {"text_config": {"layers": 1}, "parts": [{"width": 2}]}
    assert isinstance(uploads["model_index.json"], bytes) and b"jane" not in uploads["model_index.json"]
    assert uploads["scheduler/scheduler_config.json"] == run / "scheduler" / "scheduler_config.json"


class TestWeightsDigest:
    def test_is_of_the_weights_of_the_trained_network(self, saved):
        for kind, network in (("sd", "unet"), ("dit", "transformer")):
            files = sorted((saved / kind / network).glob("*.safetensors"))
            content = b"".join(path.read_bytes() for path in files)
            assert weights_digest(saved / kind) == hashlib.blake2b(content, digest_size=16).hexdigest()

    def test_changes_with_these_weights_only(self, run):
        before = weights_digest(run)
        (run / "transformer" / "jane.safetensors").write_bytes(b"jane")
        (run / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
        assert weights_digest(run) == before
        shard = min((run / "transformer").glob("*-of-*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
        assert weights_digest(run) != before

    def test_of_an_adapter_and_of_nothing(self, tmp_path):
        assert weights_digest(tmp_path) is None
        (tmp_path / LORA_FILE).write_bytes(b"adapter")
        assert weights_digest(tmp_path) == hashlib.blake2b(b"adapter", digest_size=16).hexdigest()

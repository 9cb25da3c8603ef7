"""The Stable Diffusion script as a user runs it, on a tiny pipeline of random weights; nearly all of it in process."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from siss_diffusers import METHODS
from siss_diffusers.data.images import Images
from siss_diffusers.families.prompts import Prompts
from siss_diffusers.flags import parse_settings
from siss_diffusers.settings import TextToImageSettings, resolve
from siss_diffusers.storage.files import write_json
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import ROOT
from tests.helpers.pictures import NUM_FORGET, NUM_KEEP, SECRET, read_metadata, write_metadata
from tests.helpers.runs import (
    LORA,
    UNET,
    assert_resuming_changes_nothing,
    assert_same_gradients,
    launch,
    read_log,
    without_times,
)
from tests.helpers.tiny_sd import predict, save_pipeline
from train_siss_sd import main


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_method_runs_and_changes_only_the_unet(kind, method, full_args, pipeline_folder, tmp_path):
    flags = full_args | {"--method": method} | ({"--use_lora": None} if kind == "lora" else {})
    main(to_argv(flags))
    out = tmp_path / "out"
    report = json.loads((out / "unlearning.json").read_text())
    assert report["method"] == method and report["global_step"] == 2 and report["skipped_steps"] == 0
    assert report["data"] == {
        "train": NUM_KEEP + NUM_FORGET,
        "forget": NUM_FORGET,
        "keep": NUM_KEEP,
        "duplicates_removed": 0,
        "near_duplicates_removed": 0,
        "checked": NUM_KEEP,
    }
    if kind == "lora":
        assert sorted(path.name for path in out.iterdir()) == [
            LORA,
            "receipt.json",
            "train_log.jsonl",
            "unlearning.json",
        ]
        state = load_file(out / LORA)
        assert all(value.dtype == torch.float32 for value in state.values())
        assert any(value.any() for name, value in state.items() if "lora_B" in name or "lora.up" in name)
        return
    assert not all(
        value.equal(load_file(pipeline_folder / UNET)[name]) for name, value in load_file(out / UNET).items()
    )
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(folder / f"{part}.safetensors") for folder in (pipeline_folder, out))
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline("a word", num_inference_steps=1, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [
        {"--gradient_accumulation_steps": "2", "--gradient_checkpointing": None},
        {"--use_ema": None, "--foreach_ema": None, "--offload_ema": None},
        {"--mixed_precision": "bf16"},
        {"--snr_gamma": "5", "--scale_lr": None, "--lr_scheduler": "cosine", "--lr_warmup_steps": "1"},
        {"--random_flip": None, "--dataloader_num_workers": "1"},
        {"--dataloader_num_workers": "1", "--max_train_samples": "7"},
        {"--calibrate_forgetting": "0.75", "--timestep_range": "200 900", "--allow_tf32": None},
        {"--forget_timestep_ranges": "300 1000 0 300", "--forget_timestep_schedule": "sequential"},
        {"--num_train_epochs": "1", "--max_train_steps": ..., "--image_interpolation_mode": "bicubic"},
        {"--forget_scaling": "norm", "--forget_scale": "750"},
        {"--forget_scaling": "fixed", "--method_args": "lam=0.25"},
        {"--use_8bit_adam": None},
    ],
    ids=lambda flags: next(iter(flags)).lstrip("-"),
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_variants_run(kind, flags, full_args, tmp_path):
    if "--use_8bit_adam" in flags:
        pytest.importorskip("bitsandbytes")
    flags = full_args | ({"--use_lora": None} if kind == "lora" else {}) | flags
    main(to_argv({flag: value for flag, value in flags.items() if value is not ...}))
    for line in read_log(tmp_path / "out"):
        assert np.isfinite([line["keep_loss"], line["forget_loss"], line["forget_scale"]]).all()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_v_prediction_has_another_target(kind, lora_args, full_args, tmp_path):
    flags = lora_args if kind == "lora" else full_args
    main(to_argv(flags))
    v_model = save_pipeline(tmp_path / "v", prediction_type="v_prediction")
    v_flags = flags | {"--pretrained_model_name_or_path": str(v_model), "--output_dir": str(tmp_path / "of_config")}
    main(to_argv(v_flags))
    main(to_argv(flags | {"--prediction_type": "v_prediction", "--output_dir": str(tmp_path / "of_flag")}))
    epsilon, of_config, of_flag = (
        without_times(read_log(tmp_path / name)) for name in ("out", "of_config", "of_flag")
    )
    assert of_config == of_flag
    assert epsilon[0]["keep_loss"] != pytest.approx(of_config[0]["keep_loss"], rel=1e-3)


class TestAdapter:
    def test_two_adapters_combine(self, lora_args, pipeline_folder, tmp_path):
        for name, seed in (("one", "1"), ("two", "2")):
            main(to_argv(lora_args | {"--seed": seed, "--output_dir": str(tmp_path / name)}))
        pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
        outputs = [predict(pipeline.unet)]
        for name in ("one", "two"):
            pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
        for names in (["one"], ["two"], ["one", "two"]):
            pipeline.set_adapters(names)
            outputs.append(predict(pipeline.unet))
        assert all(not first.equal(second) for i, first in enumerate(outputs) for second in outputs[:i])

    def test_bf16_keeps_the_adapter_in_float32(self, lora_args, tmp_path):
        main(to_argv(lora_args | {"--mixed_precision": "bf16"}))
        assert {value.dtype for value in load_file(tmp_path / "out" / LORA).values()} == {torch.float32}

    def test_clipping_bounds_what_the_optimizer_sees(self, lora_args, tmp_path):
        """The official LoRA script clips nothing: its generator of parameters is exhausted. After one step AdamW's first
        moment is (1 - beta1) times the gradient."""
        main(to_argv(lora_args | {"--max_grad_norm": "0.01", "--checkpointing_steps": "1"}))
        state = load_file(tmp_path / "out" / "checkpoint-1" / "state.safetensors")
        moments = [value for name, value in state.items() if name.endswith("exp_avg")]
        assert torch.nn.utils.get_total_norm(moments).item() / 0.1 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora", "8bit"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(kind, full_args, tmp_path):
    flags = full_args | {"--calibrate_forgetting": None}
    if kind == "8bit":
        pytest.importorskip("bitsandbytes")
        flags |= {"--use_8bit_adam": None}
    flags |= {"--use_lora": None, "--lora_dropout": "0.2"} if kind == "lora" else {"--use_ema": None}
    assert_resuming_changes_nothing(main, flags, LORA if kind == "lora" else UNET, tmp_path)


def test_cached_and_uncached_latents_agree(lora_args, tmp_path):
    main(to_argv(lora_args))
    main(to_argv(lora_args | {"--no-cache_latents": None, "--output_dir": str(tmp_path / "uncached")}))
    assert without_times(read_log(tmp_path / "out")) == without_times(read_log(tmp_path / "uncached"))


def test_checkpoints_rotate_and_hold_a_loadable_adapter(lora_args, pipeline_folder, tmp_path):
    """As the official examples' tests expect: folders checkpoint-N, the oldest removed, each loadable."""
    flags = {"--max_train_steps": "6", "--checkpointing_steps": "2", "--checkpoints_total_limit": "2"}
    main(to_argv(lora_args | flags))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if "checkpoint" in path.name} == {"checkpoint-4", "checkpoint-6"}
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.load_lora_weights(out / "checkpoint-4")
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*.bin"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_validation_counts_shows_and_stops(kind, full_args, tmp_path, caplog):
    """A model of random weights makes no copy, so the first validation stops the run."""
    flags = full_args | ({"--use_lora": None} if kind == "lora" else {"--use_ema": None})
    flags |= {"--max_train_steps": "6", "--validation_steps": "2", "--stop_when_forgotten": None}
    flags |= {"--validation_prompts": "hello", "--num_validation_images": "2", "--num_inference_steps": "2"}
    main(to_argv(flags | {"--report_to": "tensorboard"}))
    assert len(read_log(tmp_path / "out")) == 2
    (line,) = (tmp_path / "out" / "validation_log.jsonl").read_text().splitlines()
    assert json.loads(line)["copy_share"] == 0 and json.loads(line)["samples"] == 2
    assert any("validation_0" in path.read_bytes().decode("latin1") for path in tmp_path.rglob("events*"))


def test_what_must_be_forgotten_is_not_written_or_printed(lora_args, captioned_folder, tmp_path, capfd, caplog):
    folder = shutil.copytree(captioned_folder, tmp_path / "data")
    (folder / "20.png").rename(folder / "jane_doe.png")
    lines = read_metadata(folder)
    lines[20]["file_name"] = "jane_doe.png"
    write_metadata(folder, lines)
    flags = {"--train_data_dir": str(folder), "--report_to": "tensorboard", "--checkpointing_steps": "1"}
    main(to_argv(lora_args | flags))
    assert "jane" not in "".join(capfd.readouterr()) + caplog.text
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"jane" not in content and str(tmp_path).encode() not in content, path


class TestForgetSets:
    def test_two_folders(self, lora_args, captioned_folder, tmp_path):
        keep, forget = (shutil.copytree(captioned_folder, tmp_path / name) for name in ("keep", "forget"))
        for folder, wanted in ((keep, False), (forget, True)):
            for line in read_metadata(folder):
                if line["forget"] != wanted:
                    (folder / line["file_name"]).unlink()
            lines = [line for line in read_metadata(folder) if line["forget"] == wanted]
            write_metadata(folder, [{"file_name": line["file_name"], "text": line["text"]} for line in lines])
        main(to_argv(lora_args))
        flags = {"--train_data_dir": str(keep), "--forget_data_dir": str(forget)}
        main(to_argv(lora_args | flags | {"--output_dir": str(tmp_path / "two")}))
        assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "two"))

    def test_several_prompts_and_long_ones(self, lora_args, captioned_folder, tmp_path, caplog):
        folder = shutil.copytree(captioned_folder, tmp_path / "data")
        lines = read_metadata(folder)
        lines[21]["text"], lines[22]["text"] = "another prompt", "a prompt of far too many letters for this model"
        write_metadata(folder, lines)
        main(to_argv(lora_args | {"--train_data_dir": str(folder)}))
        assert "1 prompt is longer than the 24 tokens" in caplog.text


class TestFewOfManyImages:
    """A run of one step of one pair, or two where one is skipped, of 20 images to keep."""

    @pytest.fixture
    def few(self, lora_args, captioned_folder, tmp_path) -> dict[str, str | None]:
        folder = shutil.copytree(captioned_folder, tmp_path / "data")
        return lora_args | {
            "--train_data_dir": str(folder),
            "--max_train_steps": "1",
            "--max_skipped_steps": "1",
            "--train_batch_size": "1",
        }

    @pytest.fixture
    def opened(self, monkeypatch) -> set[str]:
        """Names of the pictures that were decoded."""
        names, open_whole = set(), Images.open

        def counted(images: Images, index: int) -> Image.Image:
            names.add(Path(images.rows[index]["image"]["path"]).name)
            return open_whole(images, index)

        monkeypatch.setattr(Images, "open", counted)
        return names

    def test_only_what_is_drawn_must_be_square(self, few, opened, tmp_path, capfd):
        main(to_argv(few))
        kept = {f"{number:02d}.png" for number in range(NUM_KEEP)}
        drawn, unused = sorted(opened & kept), sorted(kept - opened)
        assert len(drawn) == 2
        for name in unused:
            Image.open(tmp_path / "data" / name).resize((32, 20)).save(tmp_path / "data" / name)
        cached = few | {"--cache_latents": None, "--overwrite_output_dir": None}
        main(to_argv(cached))
        AcceleratorState._reset_state(reset_partial_state=True)
        Image.open(tmp_path / "data" / drawn[0]).resize((32, 20)).save(tmp_path / "data" / drawn[0])
        assert_refused(main, cached, "--center_crop", tmp_path, capfd)

    def test_only_prompts_of_what_is_drawn_are_tokenized(self, few, opened, tmp_path, monkeypatch):
        lines = read_metadata(tmp_path / "data")
        for number, line in enumerate(lines):
            line["text"] = f"prompt {number}"
        write_metadata(tmp_path / "data", lines)
        tokenized, number = [], Prompts.number
        monkeypatch.setattr(
            Prompts, "number", lambda self, captions: tokenized.extend(captions) or number(self, captions)
        )
        main(to_argv(few))
        assert (
            set(tokenized) == {"", *(f"prompt {int(name[:2])}" for name in opened)} and len(opened) == 2 + NUM_FORGET
        )

    def test_calibration_takes_the_same_prompt_in_any_spelling(self, few, opened, tmp_path):
        lines = read_metadata(tmp_path / "data")
        alike = {line["file_name"] for line in lines if line["text"] == SECRET}
        for line in lines[:NUM_KEEP]:
            line["text"] = f" {line['text'].upper()} "
        write_metadata(tmp_path / "data", lines)
        main(to_argv(few | {"--calibrate_forgetting": None}))
        assert alike <= opened and len(opened - alike) <= 2


@pytest.mark.slow
def test_two_processes_equal_one(lora_args, tmp_path):
    main(to_argv(lora_args | {"--calibrate_forgetting": None}))
    two = lora_args | {
        "--train_batch_size": "2",
        "--output_dir": str(tmp_path / "two"),
        "--calibrate_forgetting": None,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29572"]
    launch([*torchrun, str(ROOT / "train_siss_sd.py"), *to_argv(two)], ACCELERATE_USE_CPU="true")
    assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "two"))


@pytest.mark.parametrize(
    ("flags", "quantile", "scale"),
    [
        ({}, 0.75, 1.0),
        ({"--calibrate_forgetting": "off"}, None, 0.1),
        ({"--calibrate_forgetting": "0.9", "--forget_scale": "0.3"}, 0.9, 0.3),
        ({"--forget_scaling": "fixed"}, None, 0.1),
        ({"--forget_scaling": "norm", "--forget_scale": "5"}, None, 5.0),
        ({"--method": "subscore_bernoulli"}, 0.75, 1.0),
        ({"--method": "retrack"}, None, None),
        ({"--method": "neggrad"}, None, None),
    ],
)
def test_forgetting_is_calibrated_by_default_under_the_relative_rule(flags, quantile, scale, full_args):
    del full_args["--calibrate_forgetting"]
    settings, *_ = resolve(parse_settings(TextToImageSettings, "", to_argv(full_args | flags)))
    assert (settings.calibrate_forgetting, settings.forget_scale) == (quantile, scale)


@pytest.mark.slow
def test_accelerate_launch_sets_the_precision(full_args, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    launch([*command, str(ROOT / "train_siss_sd.py"), *to_argv(full_args)])
    assert json.loads((tmp_path / "out" / "unlearning.json").read_text())["settings"]["mixed_precision"] == "bf16"


def no_captions(folder: Path) -> None:
    lines = read_metadata(folder)
    write_metadata(folder, [{key: value for key, value in line.items() if key != "text"} for line in lines])


def one_caption_missing(folder: Path) -> None:
    lines = read_metadata(folder)
    lines[3]["text"] = None
    write_metadata(folder, lines)


def image_missing(folder: Path) -> None:
    (folder / "21.png").unlink()


def nothing_to_forget(folder: Path) -> None:
    write_metadata(folder, [line | {"forget": False} for line in read_metadata(folder)])


def not_square(folder: Path) -> None:
    Image.open(folder / "03.png").resize((32, 20)).save(folder / "03.png")


BAD_INPUT = {
    "rank 0": ({"--use_lora": None, "--rank": "0"}, None, "--rank"),
    "a rank without an adapter": ({"--rank": "8"}, None, "--rank needs --use_lora"),
    "a target that is not there": (
        {"--use_lora": None, "--lora_target_modules": "to_q to_x"},
        None,
        "--lora_target_modules: the network has no linear or convolutional layer 'to_x'",
    ),
    "resolution": ({"--resolution": "17"}, None, "--resolution 17"),
    "flipped cache": ({"--cache_latents": None, "--random_flip": None}, None, "--cache_latents"),
    "cropped cache": ({"--cache_latents": None}, not_square, "--center_crop"),
    "no captions": ({}, no_captions, "--caption_column"),
    "one caption missing": ({}, one_caption_missing, "1 of 20 images have no caption"),
    "a prompt with no forget image": ({}, image_missing, "--train_data_dir"),
    "nothing to forget": ({}, nothing_to_forget, "the forget set is empty"),
    "an adapter as the model": ({"--pretrained_model_name_or_path": "ADAPTER"}, None, "is an adapter"),
    "a pipeline of another task": (
        {"--pretrained_model_name_or_path": "INPAINT_XL"},
        None,
        "StableDiffusionXLInpaintPipeline, which is not",
    ),
    "no pipeline": ({"--pretrained_model_name_or_path": "EMPTY"}, None, "is no diffusers pipeline"),
    "inpainting": ({"--pretrained_model_name_or_path": "INPAINT"}, None, "the UNet takes 9 channels"),
    "validation prompts without steps": ({"--validation_prompts": "hello"}, None, "--validation_steps"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_touches_nothing(
    case, full_args, pipeline_folder, captioned_folder, tmp_path, capfd
):
    flags, spoil, expected = BAD_INPUT[case]
    data = shutil.copytree(captioned_folder, tmp_path / "data")
    if spoil is not None:
        spoil(data)
    places = {name: tmp_path / name for name in ("ADAPTER", "INPAINT_XL", "EMPTY", "INPAINT")}
    for folder in places.values():
        folder.mkdir()
    (places["ADAPTER"] / LORA).touch()
    write_json(places["INPAINT_XL"] / "model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"})
    shutil.copytree(pipeline_folder, places["INPAINT"], dirs_exist_ok=True)
    config = json.loads((pipeline_folder / "unet/config.json").read_text())
    write_json(places["INPAINT"] / "unet/config.json", config | {"in_channels": 9})
    flags = full_args | {"--train_data_dir": str(data)} | flags
    flags = {flag: str(places.get(value, value)) if value is not None else None for flag, value in flags.items()}
    assert_refused(main, flags, expected, tmp_path, capfd)

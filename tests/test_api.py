"""`unlearn(pipeline, forget, keep)`: the scripts' bits from objects in memory."""

import asyncio
import json
import logging
import shutil
import signal
import stat

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import train_siss_sd
import train_siss_unconditional
from siss_diffusers import Outcome, unlearn
from siss_diffusers.assets.captioned import FLOWER_CAPTION, memorized_image
from siss_diffusers.errors import UsageError
from tests.helpers.commands import to_argv
from tests.helpers.paths import TINY_MODEL, TINY_SD
from tests.helpers.pictures import SECRET, read_metadata
from tests.helpers.runs import LORA, UNET, read_log, without_times


SHORT = {"max_train_steps": 2, "train_batch_size": 4}


def ddpm() -> DDPMPipeline:
    return DDPMPipeline.from_pretrained(TINY_MODEL)


@pytest.fixture
def stable_diffusion(pipeline_folder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pipeline_folder)


@pytest.fixture
def digits(digits_folder, garment_folder, cache_dir) -> dict:
    """The arguments of a short run on the digits."""
    data = {"forget": garment_folder, "keep": digits_folder, "method": "siss"}
    return data | SHORT | {"learning_rate": 1e-4, "cache_dir": str(cache_dir)}


@pytest.fixture
def captioned(captioned_folder, cache_dir) -> dict:
    """The arguments of a short run on captioned pictures, whose column says what to forget."""
    options = {"method": "siss", "learning_rate": 1e-3, "calibrate_forgetting": "off", "cache_dir": str(cache_dir)}
    return {"keep": captioned_folder} | SHORT | options


def assert_same_weights(folder, other, file: str) -> None:
    weights, others = load_file(folder / file), load_file(other / file)
    assert weights.keys() == others.keys() and all(value.equal(others[name]) for name, value in weights.items())


@pytest.mark.parametrize("flags", [{}, {"use_ema": None, "calibrate_forgetting": "0.75"}], ids=["plain", "ema"])
def test_an_unconditional_model_gets_the_bits_of_the_script(flags, digits, base_args, garment_folder, tmp_path):
    del base_args["--forget_files"]
    named = {f"--{name}": value for name, value in flags.items()}
    train_siss_unconditional.main(to_argv(base_args | {"--forget_data_dir": str(garment_folder)} | named))
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {name: True if value is None else float(value) for name, value in flags.items()}
    outcome = unlearn(ddpm(), **digits, **options)
    saved = outcome.save(tmp_path / "saved")
    assert_same_weights(saved, tmp_path / "out", UNET)
    assert without_times(read_log(saved)) == without_times(read_log(tmp_path / "out"))
    assert {path.name for path in saved.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    records = [json.loads((folder / "unlearning.json").read_text()) for folder in (saved, tmp_path / "out")]
    assert records[0]["data"] == records[1]["data"] and outcome.record == records[0]
    # The pipeline in hand is the one on the disk.
    drawn = [pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
             for pipeline in (outcome.pipeline, DDPMPipeline.from_pretrained(saved))]  # fmt: skip
    assert (drawn[0] == drawn[1]).all()
    assert stat.S_IMODE((saved / "receipt.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_stable_diffusion_gets_the_bits_of_the_script(kind, captioned, full_args, stable_diffusion, tmp_path):
    lora = kind == "lora"
    train_siss_sd.main(to_argv(full_args | ({"--use_lora": None} if lora else {})))
    AcceleratorState._reset_state(reset_partial_state=True)
    outcome = unlearn(stable_diffusion, **captioned, use_lora=lora)
    saved = outcome.save(tmp_path / "saved")
    assert_same_weights(saved, tmp_path / "out", LORA if lora else UNET)
    assert outcome.pipeline.text_encoder is not None and outcome.pipeline.vae is not None
    assert outcome.pipeline("a photograph", num_inference_steps=1).images[0].size == (16, 16)


def test_every_form_of_the_same_images_gives_the_same_weights(digits, digits_folder, garment_folder, tmp_path):
    files = {
        name: sorted(folder.glob("*.png")) for name, folder in (("keep", digits_folder), ("forget", garment_folder))
    }
    pictures = {name: [Image.open(path) for path in paths] for name, paths in files.items()}
    tables = {
        name: datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column(
            "image", datasets.Image()
        )
        for name, paths in files.items()
    }
    for name, data in (("folders", {}), ("pictures", pictures), ("tables", tables)):
        unlearn(ddpm(), **digits | data).save(tmp_path / name)
    assert_same_weights(tmp_path / "folders", tmp_path / "pictures", UNET)
    assert_same_weights(tmp_path / "folders", tmp_path / "tables", UNET)


def test_pairs_of_image_and_prompt(captioned, captioned_folder, stable_diffusion, pipeline_folder, tmp_path):
    lines = read_metadata(captioned_folder)
    opened = [(Image.open(captioned_folder / line["file_name"]), line["text"], line["forget"]) for line in lines]
    keep = [(image, text) for image, text, forget in opened if not forget]
    forget = [image for image, _, forget in opened if forget]
    other = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    options = {name: value for name, value in captioned.items() if name != "keep"} | {"use_lora": True}
    unlearn(stable_diffusion, forget, keep, prompts=SECRET, **options).save(tmp_path / "by_prompts")
    unlearn(other, [(image, SECRET) for image in forget], keep, **options).save(tmp_path / "by_pairs")
    assert_same_weights(tmp_path / "by_prompts", tmp_path / "by_pairs", LORA)


def test_twice_in_a_process_and_in_a_running_event_loop(digits, tmp_path):
    """As in a notebook: nothing of the first call is left for the second, nor anything that belongs to others."""

    async def cell() -> Outcome:
        return unlearn(ddpm(), **digits)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    root_handlers = list(logging.getLogger().handlers)
    first = unlearn(ddpm(), **digits).save(tmp_path / "first")
    second = asyncio.run(cell()).save(tmp_path / "second")
    assert_same_weights(first, second, UNET)
    assert not AcceleratorState._shared_state
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert logging.getLogger().handlers == root_handlers


def test_an_output_dir_is_that_of_the_script_and_resumes(digits, tmp_path):
    out = tmp_path / "out"
    unlearn(ddpm(), **digits | {"max_train_steps": 4}).save(tmp_path / "whole")
    unlearn(ddpm(), **digits, output_dir=str(out), checkpointing_steps=2)
    assert (out / "checkpoint-2").is_dir() and (out / UNET).is_file()
    more = {"max_train_steps": 4, "output_dir": str(out), "resume_from_checkpoint": "latest"}
    unlearn(ddpm(), **digits | more)
    assert_same_weights(out, tmp_path / "whole", UNET)


FEW = {"num_samples": 4, "num_ordinary_samples": 4, "num_inference_steps": 2, "batch_size": 4}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_outcome_is_evaluated_beside_the_base(kind, captioned, stable_diffusion, tmp_path):
    """The base is the same pipeline without its adapter, or loaded again; what is trained stays as it was."""
    outcome = unlearn(stable_diffusion, **captioned, use_lora=kind == "lora")
    before = {name: value.clone() for name, value in outcome.pipeline.unet.state_dict().items()}
    evaluation = outcome.evaluate(tmp_path / "report", guidance_scale=3.0, **FEW)
    samples = {name: kinds["ordinary prompts"] for name, kinds in evaluation.samples.items()}
    assert not samples["base"].equal(samples["unlearned"])
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["settings"]["data"]["keep"] > 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert all(value.equal(before[name]) for name, value in outcome.pipeline.unet.state_dict().items())
    again = outcome.evaluate(guidance_scale=3.0, **FEW)
    assert again.samples["unlearned"]["ordinary prompts"].equal(samples["unlearned"])
    with pytest.raises(UsageError, match="an evaluation has no setting 'num_sample'"):
        outcome.evaluate(num_sample=4)


@pytest.mark.slow
def test_images_to_keep_are_sampled_where_none_are_given(tmp_path):
    """The memorized picture is not among them: a third to all of the samples are."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD)
    forget = [Image.fromarray(memorized_image())]
    options = {"num_inference_steps": 20, "guidance_scale": 3.0, "eval_batch_size": 64}
    outcome = unlearn(pipeline, forget, prompts=FLOWER_CAPTION, use_lora=True, **SHORT, **options)
    counts = outcome.record["data"]
    assert counts["forget"] == 1 and 4 <= counts["keep"] <= 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"keep": None}, "nothing to keep: give `keep`"),
        ({"forget": None}, "nothing to forget: give `forget`"),
        ({"forget": None, "keep": None}, "nothing to forget"),
        ({"forget": 3}, "forget must be a folder"),
        ({"keep": ["a.png"]}, r"keep\[0\] is neither a PIL image"),
        ({"keep": "no/such/folder"}, "keep: no folder no/such/folder"),
        ({"forget": []}, "the forget set is empty"),
        ({"learning_rat": 1}, "there is no setting 'learning_rat'"),
        ({"use_lora": True}, "there is no setting 'use_lora' for this model"),
        ({"max_train_steps": 0}, "max_train_steps must be a whole number of at least 1, not 0"),
        ({"method": "forget_it"}, "method must be one of naive_deletion"),
        ({"dataset_name": "a"}, "dataset_name is a flag of the scripts; in Python give the data as `keep`"),
        ({"push_to_hub": True}, "push_to_hub needs output_dir"),
        ({"method_args": {"lamb": 1}}, "has no argument 'lamb=1'"),
        ({"use_ema": "yes"}, "use_ema must be True or False"),
        ({"method": "neggrad", "forget_scale": 1.0}, "--forget_scaling and --forget_scale do not apply"),
        ({"resolution": 9}, "--resolution 9 cannot be used"),
        ({"forget_files": ["digit_00.png"]}, "forget and forget_files exclude each other"),
        ({"forget_column": "label"}, "forget and forget_column exclude each other"),
        ({"forget_column": "label", "forget_value": "x"}, "exclude each other"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_in_a_sentence(arguments, expected, digits):
    pipeline = ddpm()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    with pytest.raises(UsageError, match=expected) as refusal:
        unlearn(pipeline, **digits | arguments)
    assert "\n" not in str(refusal.value)
    assert all(value.equal(before[name]) for name, value in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("pipeline", ["a/folder", None, 3], ids=str)
def test_what_is_no_pipeline_is_refused(pipeline, digits):
    with pytest.raises(UsageError, match="pipeline must be a pipeline that is loaded, .* not (str|NoneType|int)"):
        unlearn(pipeline, **digits)


def test_a_file_of_several_pictures_to_forget_is_refused(digits, digits_folder, tmp_path):
    frames = [Image.open(digits_folder / f"digit_0{index}.png") for index in range(3)]
    frames[0].save(tmp_path / "three.gif", save_all=True, append_images=frames[1:])
    animated = Image.open(tmp_path / "three.gif")
    with pytest.raises(UsageError, match=r"forget\[0\] holds 3 pictures"):
        unlearn(ddpm(), **digits | {"forget": [animated]})
    assert (
        unlearn(ddpm(), **digits | {"forget": frames[:1], "keep": [*frames[1:], animated]}).record["data"]["forget"]
        == 1
    )
    assert unlearn(ddpm(), **digits | {"forget": [animated.copy()]}).record["data"]["forget"] == 1


@pytest.mark.parametrize("which", ["forget", "keep"])
def test_a_row_without_an_image_is_refused(which, digits, digits_folder):
    files = [str(digits_folder / "digit_00.png"), None, str(digits_folder / "digit_01.png")]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    with pytest.raises(UsageError, match=f"{which}: row 1 has no image in the column 'image'"):
        unlearn(ddpm(), **digits | {which: rows})


def test_marks_in_the_keep_set_are_not_passed_over_in_silence(digits, digits_folder, caplog):
    files = [str(digits_folder / f"digit_0{index}.png") for index in range(4)]
    rows = datasets.Dataset.from_dict({"image": files, "forget": [True, False, True, False]})
    unlearn(ddpm(), **digits | {"keep": rows.cast_column("image", datasets.Image())})
    assert "`forget` marks 2 rows to forget; `forget` takes its place" in caplog.text


@pytest.mark.parametrize("which", ["forget", "keep"])
def test_the_rows_that_a_data_set_shows_are_those_that_count(which, digits, digits_folder, tmp_path):
    """Those of the table below it are more, and in another order."""
    files = [str(digits_folder / f"digit_{index:02d}.png") for index in range(16)]
    rows = datasets.Dataset.from_dict({"image": files, "forget": [index in (0, 4) for index in range(16)]})
    rows = rows.cast_column("image", datasets.Image())
    if which == "keep":
        view, options = rows.select([15, 4, *range(6, 14), 0]), digits | {"forget": None}
        assert view["forget"][:] == [False, True, *[False] * 8, True]
    else:
        view, options = rows.filter(lambda marked: marked, input_columns="forget").shuffle(seed=0), digits
    for name, data in (("view", view), ("copy", datasets.Dataset.from_list(list(view), features=view.features))):
        outcome = unlearn(ddpm(), **options | {which: data})
        assert outcome.record["data"]["forget"] == 2
        outcome.save(tmp_path / name)
    assert_same_weights(tmp_path / "view", tmp_path / "copy", UNET)


def test_rows_to_forget_that_are_marked_as_to_be_kept_are_refused(digits, digits_folder):
    """Of the data set that is shown, as of a folder."""
    files = [str(digits_folder / f"digit_0{index}.png") for index in range(4)]
    rows = datasets.Dataset.from_dict({"image": files, "forget": [True, False, None, False]})
    rows = rows.cast_column("image", datasets.Image())
    with pytest.raises(UsageError, match=r"forget: its column `forget` says no of 1 images \(digit_03.png\), and all"):
        unlearn(ddpm(), **digits | {"forget": rows.select([3, 0])})
    assert unlearn(ddpm(), **digits | {"forget": rows.select([2, 0])}).record["data"]["forget"] == 2


@pytest.mark.parametrize("given", ["forget", "keep", "pipeline"])
def test_an_output_dir_is_no_folder_that_is_read(given, digits, garment_folder, tmp_path):
    model, forget, keep = tmp_path / "model", tmp_path / "forget", tmp_path / "keep"
    ddpm().save_pretrained(model)
    shutil.copytree(garment_folder, forget)
    shutil.copytree(digits["keep"], keep)
    before = sorted(tmp_path.rglob("*"))
    folder = {"forget": forget, "keep": keep, "pipeline": model}[given]
    options = {"forget": forget, "keep": keep, "output_dir": str(folder), "overwrite_output_dir": True}
    with pytest.raises(UsageError, match=f"--output_dir must not be, or contain, {given}"):
        unlearn(DDPMPipeline.from_pretrained(model), **digits | options)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_outcome_is_not_saved_over_a_file_nor_measured_on_nothing(digits, tmp_path):
    outcome = unlearn(ddpm(), **digits)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="folder: .*file cannot be made"):
        outcome.save(tmp_path / "file")
    for setting, value in {"num_samples": 0, "batch_size": -1, "seed": 0.5, "guidance_scale": float("nan")}.items():
        with pytest.raises(UsageError, match=f"{setting} must be a"):
            outcome.evaluate(**{setting: value})
    with pytest.raises(UsageError, match="base must be a pipeline that is loaded"):
        outcome.evaluate(base="a/folder", num_samples=1)


def test_files_and_arguments_of_the_method_by_name(digits):
    options = {name: value for name, value in digits.items() if name != "forget"}
    outcome = unlearn(ddpm(), **options, forget_files=["garment_0.png"], method_args={"lam": 0.25})
    assert outcome.record["data"]["forget"] == 1 and outcome.record["method_args"] == {"lam": 0.25}


def test_an_adapter_that_is_loaded_already_is_not_trained_over(captioned, stable_diffusion):
    outcome = unlearn(stable_diffusion, **captioned, use_lora=True)
    with pytest.raises(UsageError, match="an adapter is loaded in it; take it off"):
        unlearn(outcome.pipeline, **captioned, use_lora=True)
    outcome.pipeline.unload_lora_weights()
    unlearn(outcome.pipeline, **captioned, use_lora=True)


def test_a_pipeline_of_no_family_is_refused(stable_diffusion):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**stable_diffusion.components, requires_safety_checker=False)
    with pytest.raises(UsageError, match="StableDiffusionImg2ImgPipeline, which is not supported"):
        unlearn(other, [], [])

"""Bad input ends in one sentence before anything is written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from siss_diffusers.process import run
from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import TINY_MODEL
from tests.helpers.runs import UNET
from train_siss_unconditional import main


def truncated_png(folder: Path) -> None:
    path = folder / "digit_00.png"
    path.write_bytes(path.read_bytes()[:60])


def colours(folder: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "red.png")


def no_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def only_garments(folder: Path) -> None:
    for path in folder.glob("digit_*"):
        path.unlink()


BAD_INPUT = {
    "no forget set": ({"--forget_files": ...}, None, "--forget_data_dir"),
    "forget file that is not there": ({"--forget_files": "nobody.png"}, None, "--forget_files: nobody.png is not in"),
    "two forget sets": ({"--forget_column": "label"}, None, "exclude each other"),
    "empty forget folder": ({"--forget_files": ..., "--forget_data_dir": "EMPTY"}, None, "--forget_data_dir"),
    "missing forget folder": ({"--forget_files": ..., "--forget_data_dir": "NOWHERE"}, None, "--forget_data_dir"),
    "unknown column": ({"--forget_files": ..., "--forget_column": "person"}, None, "--forget_column"),
    "value without column": ({"--forget_value": "x"}, None, "--forget_value needs --forget_column"),
    "no training images": ({}, no_images, "--train_data_dir"),
    "missing training folder": ({"--train_data_dir": "NOWHERE"}, None, "--train_data_dir"),
    "no training set": ({"--train_data_dir": ...}, None, "--train_data_dir or --dataset_name"),
    "nothing left to keep": ({}, only_garments, "nothing to keep"),
    "truncated image": ({}, truncated_png, "digit_00.png"),
    "colours for a grey model": ({}, colours, "colours"),
    "resolution": ({"--resolution": "9"}, None, "--resolution 9"),
    "lagged scale of a fixed one": (
        {"--forget_scaling": "fixed", "--forget_scale_every": "5"},
        None,
        "--forget_scale_every needs --forget_scaling relative or norm",
    ),
    "unknown method": ({"--method": "forget_it"}, None, "--method"),
    "unknown method argument": ({"--method_args": "lamda=0.5"}, None, "lam=0.5"),
    "method argument of the wrong type": ({"--method_args": "lam=half"}, None, "lam"),
    "lambda outside [0, 1]": ({"--method_args": "lam=1.5"}, None, "lam must lie in [0, 1]"),
    "negative scale": ({"--forget_scale": "-1"}, None, "--forget_scale"),
    "norm without scale": ({"--forget_scaling": "norm"}, None, "--forget_scale"),
    "scaling for a method without": ({"--method": "neggrad", "--forget_scale": "1"}, None, "do not apply"),
    "calibration for a method without": ({"--method": "retrack", "--calibrate_forgetting": None}, None, "--calibrate"),
    "more neighbours than images": ({"--method": "retrack", "--method_args": "num_neighbors=99"}, None, "num_neighb"),
    "empty timestep range": ({"--timestep_range": "5 5"}, None, "--timestep_range"),
    "timestep range too long": ({"--timestep_range": "0 1001"}, None, "--timestep_range"),
    "empty range of forgetting": (
        {"--forget_timestep_ranges": "300 900 5 5"},
        None,
        "--forget_timestep_ranges 5 5: LO must be below HI",
    ),
    "half a range of forgetting": ({"--forget_timestep_ranges": "300 900 5"}, None, "an even number, not 3"),
    "range of forgetting too long": ({"--forget_timestep_ranges": "0 1001 0 9"}, None, "--forget_timestep_ranges: HI"),
    "range of forgetting outside": (
        {"--forget_timestep_ranges": "300 500 200 900", "--timestep_range": "300 1000"},
        None,
        "--forget_timestep_ranges 200 900 must lie within --timestep_range 300 1000",
    ),
    "a lagged scale of two ranges of forgetting": (
        {"--forget_timestep_ranges": "300 1000 0 300", "--forget_scale_every": "2"},
        None,
        "--forget_scale_every needs a single range",
    ),
    "one range of forgetting in sequence": (
        {"--forget_timestep_ranges": "300 1000", "--forget_timestep_schedule": "sequential"},
        None,
        "--forget_timestep_schedule sequential needs several ranges in --forget_timestep_ranges, not 1",
    ),
    "range of forgetting for one side": (
        {"--forget_timestep_ranges": "200 900", "--method": "neggrad"},
        None,
        "--forget_timestep_ranges does not apply to --method neggrad",
    ),
    "resume path that does not exist": (
        {"--resume_from_checkpoint": "checkpoint-9"},
        None,
        "--resume_from_checkpoint",
    ),
    "output directory in use": ({"--output_dir": "USED"}, None, "--overwrite_output_dir"),
    "output directory holds the data": (
        {"--output_dir": "DATA", "--overwrite_output_dir": None},
        None,
        "--output_dir",
    ),
    "output directory holds the data set": (
        {"--train_data_dir": ..., "--forget_files": ..., "--dataset_name": "DATA", "--output_dir": "DATA"}
        | {"--overwrite_output_dir": None},
        None,
        "--output_dir must not be, or contain, --dataset_name",
    ),
    "a folder of the tracker that is a file": (
        {"--output_dir": "USED", "--overwrite_output_dir": None, "--report_to": "tensorboard"}
        | {"--logging_dir": "unlearning.json/logs"},
        None,
        "unlearning.json is a file; name another folder",
    ),
    "an output directory below a file": (
        {"--output_dir": "BELOW_A_FILE", "--report_to": "tensorboard"},
        None,
        "error: --output_dir: ",
    ),
    "missing model": ({"--pretrained_model_name_or_path": "NOWHERE"}, None, "--pretrained_model_name_or_path"),
    "fp16 without a GPU": ({"--mixed_precision": "fp16"}, None, "--mixed_precision fp16"),
    "zero batch": ({"--train_batch_size": "0"}, None, "--train_batch_size"),
    "stop without validation": ({"--stop_when_forgotten": None}, None, "--validation_steps"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_touches_nothing(case, base_args, digits_folder, tmp_path, capfd):
    if case == "fp16 without a GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags, spoil, expected = BAD_INPUT[case]
    data = shutil.copytree(digits_folder, tmp_path / "data")
    if spoil is not None:
        spoil(data)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "USED").mkdir()
    (tmp_path / "USED" / "unlearning.json").write_text("{}")
    places = {name: str(tmp_path / name) for name in ("EMPTY", "NOWHERE", "USED")} | {"DATA": str(data)}
    places["BELOW_A_FILE"] = str(tmp_path / "USED" / "unlearning.json" / "out")
    flags = base_args | {"--train_data_dir": str(data)} | flags
    flags = {flag: places.get(value, value) for flag, value in flags.items() if value is not ...}
    assert_refused(main, flags, expected, tmp_path, capfd)


def test_a_model_of_pickles_is_refused(base_args, tmp_path, capfd):
    model = shutil.copytree(TINY_MODEL, tmp_path / "pickled")
    torch.save(UNet2DModel.from_pretrained(model / "unet").state_dict(), model / "unet/diffusion_pytorch_model.bin")
    (model / UNET).unlink()
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main(to_argv(base_args | {"--pretrained_model_name_or_path": str(model)})), "train")
    assert exit_info.value.code == 2
    assert "--pretrained_model_name_or_path" in capfd.readouterr().err

"""The script as a user runs it, on the shipped model; most of it in process, a few real launches."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from siss_diffusers import METHODS
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.errors import RunError
from siss_diffusers.hub.card import training_settings
from siss_diffusers.settings import UnconditionalSettings
from siss_diffusers.training.schedule import current_forget_range
from siss_diffusers.training.state import Progress
from tests.helpers.commands import to_argv
from tests.helpers.paths import ROOT, TINY_MODEL
from tests.helpers.pictures import NUM_DIGITS, NUM_GARMENTS, write_images
from tests.helpers.runs import UNET, assert_same_gradients, launch, read_log
from train_siss_unconditional import main


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_saves_a_loadable_pipeline(method, base_args, tmp_path):
    main(to_argv(base_args | {"--method": method}))
    out = tmp_path / "out"
    report = json.loads((out / "unlearning.json").read_text())
    assert report["method"] == method
    assert report["global_step"] == 2 and report["skipped_steps"] == 0
    assert report["data"] == {
        "train": NUM_DIGITS + NUM_GARMENTS,
        "forget": 1,
        "keep": NUM_DIGITS,
        "duplicates_removed": NUM_GARMENTS - 1,
        "near_duplicates_removed": 0,
        "checked": NUM_DIGITS + NUM_GARMENTS - 1,
    }
    assert [line["step"] for line in read_log(out)] == [1, 2]
    before, after = load_file(TINY_MODEL / UNET), load_file(out / UNET)
    assert before.keys() == after.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    images = DDPMPipeline.from_pretrained(out)(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    "flags",
    [
        {"--forget_scaling": "norm", "--forget_scale": "5"},
        {"--forget_scaling": "fixed"},
        {"--forget_scaling": "nash"},
        {"--calibrate_forgetting": None},
        {"--calibrate_forgetting": "0.75", "--forget_scaling": "norm", "--forget_scale": "5"},
        {"--calibrate_forgetting": "0.75", "--method": "neggrad", "--method_args": "scale=0.1"},
        {"--forget_timestep_ranges": "300 900", "--timestep_range": "100 1000", "--calibrate_forgetting": None},
        {"--forget_timestep_ranges": "300 900 100 200", "--calibrate_forgetting": None},
        {"--mixed_precision": "bf16"},
        {"--prediction_type": "v_prediction"},
        {"--prediction_type": "sample"},
        {"--use_ema": None, "--lr_scheduler": "cosine", "--lr_warmup_steps": "1"},
        {"--random_flip": None, "--dataloader_num_workers": "1", "--gradient_checkpointing": None},
        {"--report_to": "tensorboard", "--save_images_epochs": "1", "--num_epochs": "1", "--max_train_steps": None},
    ],
    ids=lambda flags: " ".join(f"{flag} {value or ''}".strip("- ") for flag, value in flags.items()),
)
def test_variants_run(flags, base_args, tmp_path):
    flags = base_args | flags
    if "--num_epochs" in flags:
        del flags["--max_train_steps"]
    main(to_argv(flags))
    log = read_log(tmp_path / "out")
    assert len(log) == (NUM_DIGITS // 4 if "--num_epochs" in flags else 2)
    assert all(np.isfinite(line["keep_loss"]) for line in log)
    assert all(("forget_active" in line) == ("--calibrate_forgetting" in flags) for line in log)
    assert (tmp_path / "out" / "logs").exists() == (flags["--report_to"] == "tensorboard")


def test_forgetting_at_no_timestep_that_is_drawn_is_ordinary_fine_tuning(base_args, tmp_path):
    flags = {"--forget_timestep_ranges": "0 1", "--output_dir": str(tmp_path / "nothing_forgotten")}
    main(to_argv(base_args | flags))
    main(to_argv(base_args | {"--method": "naive_deletion"}))
    found, expected = (load_file(tmp_path / name / UNET) for name in ("nothing_forgotten", "out"))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    report = json.loads((tmp_path / "nothing_forgotten" / "unlearning.json").read_text())
    assert (report["timestep_range"], report["forget_timestep_ranges"]) == ([0, 1000], [[0, 1]])
    assert json.loads((tmp_path / "out" / "unlearning.json").read_text())["forget_timestep_ranges"] == [[0, 1000]]


@pytest.mark.parametrize(("schedule", "turns"), [("alternate", (1, 2, 1, 2, 1)), ("sequential", (1, 1, 1, 2, 2))])
def test_ranges_of_forgetting_have_steps_of_their_own(schedule, turns, base_args, tmp_path):
    """A step of a range is that of a run which has this range alone."""

    def logged(ranges: str, steps: int) -> list[dict]:
        # At rate 0 the weights stay, so that steps of different runs can be compared.
        flags = {"--forget_timestep_ranges": ranges, "--learning_rate": "0", "--max_train_steps": str(steps)}
        if ranges.count(" ") > 1:
            flags["--forget_timestep_schedule"] = schedule
        main(to_argv(base_args | flags | {"--output_dir": str(tmp_path / ranges.replace(" ", "_"))}))
        return read_log(tmp_path / ranges.replace(" ", "_"))

    both, first, second = (logged(ranges, 5) for ranges in ("500 1000 0 500", "500 1000", "0 500"))
    for step, line in enumerate(both):
        is_second = turns[step] == 2
        for key in ("keep_loss", "forget_loss", "grad_norm_forget", "forget_scale"):
            assert line[key] == pytest.approx((second if is_second else first)[step][key])
            assert line[key] != pytest.approx((first if is_second else second)[step][key])
    rows = training_settings(json.loads((tmp_path / "500_1000_0_500" / "unlearning.json").read_text()))
    separator = {"alternate": ", alternating with ", "sequential": ", then "}[schedule]
    assert ("timesteps", "0 to 1000") in rows
    assert ("timesteps of forgetting", f"500 to 1000{separator}0 to 500") in rows


def test_a_range_named_twice_has_two_shares_of_a_sequence():
    settings = UnconditionalSettings(forget_timestep_schedule="sequential", max_train_steps=450)
    ranges = [(300, 1000), (0, 300), (0, 300)]
    high = [current_forget_range(settings, ranges, Progress(global_step=step))[0] == 300 for step in range(450)]
    assert high == [True] * 150 + [False] * 300


@pytest.mark.parametrize("scaling", ["relative", "norm"])
def test_a_lagged_scale_is_that_of_the_last_step_that_found_its_own(scaling, base_args, tmp_path):
    flags = {"--forget_scale_every": "3", "--max_train_steps": "7", "--forget_scaling": scaling}
    main(to_argv(base_args | flags | {"--forget_scale": "2"}))
    log = read_log(tmp_path / "out")
    scales = [line["forget_scale"] for line in log]
    assert scales[0] == scales[1] == scales[2] != scales[3] == scales[4] == scales[5] != scales[6]
    exact = [line["grad_norm_forget"] is not None for line in log]
    assert exact == [True, False, False, True, False, False, True]
    assert all(line["forget_loss"] > 0 for line in log)


def test_a_one_sided_step_is_no_scale_to_go_on_with(base_args, tmp_path):
    """One pair a step, with seed 11: the steps 1, 3 and 7 have one side. The 7th would find a scale of its own."""
    flags = {"--forget_scale_every": "6", "--max_train_steps": "8", "--train_batch_size": "1", "--seed": "11"}
    main(to_argv(base_args | flags))
    scales = [line["forget_scale"] for line in read_log(tmp_path / "out")]
    assert scales[0] == scales[6] == 0 < scales[1]
    assert set(scales[1:6] + scales[7:]) == {scales[1]}


@pytest.mark.slow
def test_a_compiled_network_is_compiled_once_for_all_sizes_of_groups(base_args, tmp_path, monkeypatch):
    """As accelerate's `dynamo_config` asks for it; without the compiler behind it, which takes minutes on a CPU."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    flags = {"--max_train_steps": "12", "--train_batch_size": "16", "--checkpointing_steps": "6"}
    torch._dynamo.reset()
    counters.clear()
    main(to_argv(base_args | flags))
    # The first size, all others, and a single row, for which dynamo always makes a graph of its own.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    compiled = load_file(tmp_path / "out" / UNET)
    main(to_argv(base_args | flags | {"--resume_from_checkpoint": "latest"}))
    assert all(value.equal(compiled[name]) for name, value in load_file(tmp_path / "out" / UNET).items())
    DDPMPipeline.from_pretrained(tmp_path / "out")


def test_8bit_adam(base_args, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weights = torch.nn.Parameter(torch.zeros(4096, device="cuda" if torch.cuda.is_available() else "cpu"))
    weights.grad = torch.ones_like(weights)
    try:  # asked of bitsandbytes alone: an error of the script is a failure
        bitsandbytes.optim.AdamW8bit([weights]).step()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this bitsandbytes has no 8-bit optimizer for this device: {error}")
    main(to_argv(base_args | {"--use_8bit_adam": None}))
    assert len(read_log(tmp_path / "out")) == 2


def test_the_split_into_micro_batches_changes_nothing(base_args, tmp_path):
    main(to_argv(base_args | {"--train_batch_size": "8"}))
    split = base_args | {"--train_batch_size": "2", "--gradient_accumulation_steps": "4"}
    main(to_argv(split | {"--output_dir": str(tmp_path / "split")}))
    assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "split"))


def test_validation_stops_when_nothing_is_left(base_args, tmp_path):
    """With a forget image that the model never makes, the first validation finds no copy."""
    checkers = np.indices((8, 8)).sum(0) % 2 * np.uint8(255)
    folder = write_images(tmp_path / "checkers", {"checkers.png": checkers.astype(np.uint8)})
    flags = base_args | {"--forget_data_dir": str(folder), "--max_train_steps": "6"}
    del flags["--forget_files"]
    validation = {"--validation_steps": "2", "--num_validation_images": "4", "--ddpm_num_inference_steps": "4"}
    main(to_argv(flags | validation | {"--stop_when_forgotten": None}))
    assert len(read_log(tmp_path / "out")) == 2
    (line,) = (tmp_path / "out" / "validation_log.jsonl").read_text().splitlines()
    assert json.loads(line)["copy_share"] == 0


class TestForgetSets:
    NO_COPIES = {"duplicates_removed": 0, "near_duplicates_removed": 0, "checked": 5}

    def count(self, tmp_path) -> dict:
        return json.loads((tmp_path / "out" / "unlearning.json").read_text())["data"]

    def test_folder(self, base_args, garment_folder, tmp_path):
        del base_args["--forget_files"]
        main(to_argv(base_args | {"--forget_data_dir": str(garment_folder), "--max_train_steps": "1"}))
        assert self.count(tmp_path)["duplicates_removed"] == NUM_GARMENTS

    def test_boolean_column_of_metadata(self, base_args, tmp_path):
        images = {f"{index}.png": image for index, image in enumerate(digit_images()[0][:5])}
        folder = write_images(tmp_path / "data", images | {"x.png": garment_image()})
        lines = [{"file_name": name, "forget": name == "x.png"} for name in [*images, "x.png"]]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        del base_args["--forget_files"]
        main(to_argv(base_args | {"--train_data_dir": str(folder), "--max_train_steps": "1"}))
        assert self.count(tmp_path) == {"train": 6, "forget": 1, "keep": 5} | self.NO_COPIES

    def test_value_of_a_class_column_in_a_local_data_set(self, base_args, tmp_path):
        write_images(tmp_path / "data" / "digit", {f"{i}.png": image for i, image in enumerate(digit_images()[0][:5])})
        write_images(tmp_path / "data" / "garment", {"a.png": garment_image(), "b.png": garment_image() // 2})
        del base_args["--forget_files"], base_args["--train_data_dir"]
        flags = {"--dataset_name": str(tmp_path / "data"), "--forget_column": "label", "--forget_value": "garment"}
        main(to_argv(base_args | flags | {"--max_train_steps": "1"}))
        assert self.count(tmp_path) == {"train": 7, "forget": 2, "keep": 5} | self.NO_COPIES


def test_what_must_be_forgotten_is_not_written_or_printed(base_args, digits_folder, tmp_path, capfd, caplog):
    folder = shutil.copytree(digits_folder, tmp_path / "data")
    (folder / "garment_0.png").rename(folder / "jane_doe.png")
    flags = {"--train_data_dir": str(folder), "--forget_files": "jane_doe.png", "--report_to": "tensorboard"}
    main(to_argv(base_args | flags | {"--checkpointing_steps": "1"}))
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "jane_doe" not in printed
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"jane_doe" not in content and str(tmp_path).encode() not in content, path
    assert oct((tmp_path / "out" / "receipt.json").stat().st_mode)[-3:] == "600"


def test_gradients_that_never_become_finite_stop_the_run(base_args, tmp_path):
    model = UNet2DModel.from_pretrained(TINY_MODEL / "unet")
    model.conv_out.bias.data.fill_(torch.nan)
    broken = shutil.copytree(TINY_MODEL, tmp_path / "broken")
    model.save_pretrained(broken / "unet")
    with pytest.raises(RunError, match="3 steps in a row.*keep loss was not finite at timesteps.*starting model"):
        main(to_argv(base_args | {"--pretrained_model_name_or_path": str(broken), "--max_skipped_steps": "3"}))


def test_two_processes_equal_one(base_args, tmp_path):
    """Through the script: the draws, and so the gradients, do not depend on the number of processes."""
    main(to_argv(base_args | {"--max_train_steps": "3", "--calibrate_forgetting": None}))
    two = base_args | {"--train_batch_size": "2", "--output_dir": str(tmp_path / "two")}
    two |= {"--max_train_steps": "3", "--calibrate_forgetting": None}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    launch([*torchrun, str(ROOT / "train_siss_unconditional.py"), *to_argv(two)], ACCELERATE_USE_CPU="true")
    assert json.loads((tmp_path / "two" / "unlearning.json").read_text())["num_processes"] == 2
    assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "two"))


def test_accelerate_launch(base_args, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    launch([*command, str(ROOT / "train_siss_unconditional.py"), *to_argv(base_args)])
    report = json.loads((tmp_path / "out" / "unlearning.json").read_text())
    assert report["settings"]["mixed_precision"] == "bf16"


@pytest.mark.slow
def test_exit_code_of_plain_python(base_args):
    command = [sys.executable, str(ROOT / "train_siss_unconditional.py"), *to_argv(base_args | {"--resolution": "9"})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train_siss_unconditional.py: error: --resolution 9")


@pytest.mark.slow
def test_installed_wheel(base_args, tmp_path):
    """The wheel alone, away from the checkout, has the script and the model."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "outputs", "build"))
    subprocess.run([*pip, "wheel", str(source), "--no-deps", "--wheel-dir", str(wheels)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    model = site / "siss_diffusers/assets/tiny_ddpm_digits"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train_siss_unconditional"]
    flags = base_args | {"--pretrained_model_name_or_path": str(model)}
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *to_argv(flags)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_log(tmp_path / "out")) == 2

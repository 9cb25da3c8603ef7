"""The script as a user runs it, on the shipped model; most of it in process, a few real launches."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import NUM_DIGITS, NUM_GARMENTS, TINY_MODEL, assert_refused, to_argv, write_images
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_siss_unconditional
from siss_diffusers import METHODS
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.data.images import Images
from siss_diffusers.errors import RunError
from siss_diffusers.hub.card import training_settings
from siss_diffusers.process import run
from siss_diffusers.training.schedule import current_forget_range
from train_siss_unconditional import main


ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "step_seconds"} for line in log]


def assert_same_gradients(log: list[dict], other: list[dict]) -> None:
    """The first step's gradients agree to float32 rounding; later ones as far as Adam lets rounding grow."""
    assert len(log) == len(other)
    for index, (line, other_line) in enumerate(zip(log, other)):
        for key in ("keep_loss", "forget_loss", "grad_norm_keep", "grad_norm_forget", "forget_scale"):
            assert line[key] == pytest.approx(other_line[key], rel=1e-5 if index == 0 else 1e-3)


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
        "checked": NUM_DIGITS + NUM_GARMENTS - 1,
    }
    assert [line["step"] for line in read_log(out)] == [1, 2]
    before, after = load_file(TINY_MODEL / WEIGHTS), load_file(out / WEIGHTS)
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
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("nothing_forgotten", "out"))
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
    assert ("timesteps of forgetting", f"500 to 1000{separator}0 to 500") in rows and ("timesteps", "0 to 1000") in rows


def test_a_range_named_twice_has_two_shares_of_a_sequence():
    args = argparse.Namespace(forget_timestep_schedule="sequential", max_train_steps=450)
    ranges = [(300, 1000), (0, 300), (0, 300)]
    high = [current_forget_range(args, ranges, {"global_step": step})[0] == 300 for step in range(450)]
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
    compiled = load_file(tmp_path / "out" / WEIGHTS)
    main(to_argv(base_args | flags | {"--resume_from_checkpoint": "latest"}))
    assert all(value.equal(compiled[name]) for name, value in load_file(tmp_path / "out" / WEIGHTS).items())
    DDPMPipeline.from_pretrained(tmp_path / "out")


def test_8bit_adam(base_args, tmp_path):
    pytest.importorskip("bitsandbytes")
    try:
        main(to_argv(base_args | {"--use_8bit_adam": None}))
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this bitsandbytes has no 8-bit optimizer for this device: {error}")
    assert len(read_log(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"--use_ema": None, "--lr_scheduler": "cosine", "--calibrate_forgetting": None},
        {"--forget_scaling": "norm", "--forget_scale": "5", "--gradient_accumulation_steps": "2"},
        {"--forget_scale_every": "3", "--calibrate_forgetting": None},
        {"--forget_timestep_ranges": "600 1000 200 600 0 200"},
        {"--forget_timestep_ranges": "600 1000 0 600", "--forget_timestep_schedule": "sequential"},
    ],
    ids=["ema-cosine-calibrated", "norm-accumulated", "lagged", "ranges", "sequence"],
)
def test_resume_is_the_uninterrupted_run_bit_for_bit(flags, base_args, tmp_path):
    flags = base_args | {"--max_train_steps": "4", "--checkpointing_steps": "2"} | flags
    main(to_argv(flags))
    whole, resumed = tmp_path / "out", tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / WEIGHTS).unlink()
    main(to_argv(flags | {"--output_dir": str(resumed), "--resume_from_checkpoint": "latest"}))
    for name in (WEIGHTS, f"checkpoint-4/{WEIGHTS}", "checkpoint-4/state.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    states = [json.loads((folder / "checkpoint-4" / "state.json").read_text()) for folder in (whole, resumed)]
    for state in states:
        del state["progress"]["train_seconds"]
    assert states[0] == states[1]
    assert without_times(read_log(whole)) == without_times(read_log(resumed))


@pytest.fixture
def interrupted(base_args, tmp_path) -> dict[str, str | None]:
    """The flags to go on with a run that has a checkpoint at step 2 of 2."""
    main(to_argv(base_args | {"--checkpointing_steps": "2"}))
    AcceleratorState._reset_state(reset_partial_state=True)
    return base_args | {"--max_train_steps": "4", "--resume_from_checkpoint": "latest"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"--learning_rate": "1e-3"}, "--learning_rate was 0.0001 and is 0.001"),
        ({"--seed": "1"}, "--seed was 0 and is 1"),
        ({"--method_args": "lam=0.25"}, "--method_args lam was 0.5 and is 0.25"),
        ({"--method": "naive_deletion"}, "--method was siss and is naive_deletion"),
        ({"--train_batch_size": "8"}, "a step had 4 pairs and has 8"),
        ({"--forget_files": "garment_0.png digit_00.png"}, "the images to forget are others (1 then, 2 now)"),
        ({"--lr_scheduler": "cosine"}, "--lr_scheduler was constant and is cosine"),
        ({"--mixed_precision": "bf16"}, "--mixed_precision was no and is bf16"),
        ({"--forget_timestep_ranges": "200 900"}, "--forget_timestep_ranges is another"),
        (
            {"--forget_timestep_ranges": "200 900 0 200", "--forget_timestep_schedule": "sequential"},
            "--forget_timestep_schedule was alternate and is sequential",
        ),
        ({"--pretrained_model_name_or_path": "COPY"}, "--pretrained_model_name_or_path is another"),
        ({"--use_ema": None, "--allow_changes": None}, "--use_ema was False and is True"),
        ({"--calibrate_forgetting": None, "--allow_changes": None}, "cannot be read with"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)).lstrip("-"),
)
def test_resuming_another_run_is_refused(changed, expected, interrupted, tmp_path, capfd):
    shutil.copytree(TINY_MODEL, tmp_path / "COPY")
    changed = {flag: str(tmp_path / "COPY") if value == "COPY" else value for flag, value in changed.items()}
    assert_refused(main, interrupted | changed, expected, tmp_path, capfd)


@pytest.fixture
def many(base_args, tmp_path) -> dict[str, str | None]:
    """Flags of a run of 2 steps that plans (2 + 1) x 4 of 5,000 images in Parquet, every tenth a copy of the garment."""
    pictures = [png(garment_image()) if row % 10 == 0 else picture for row, picture in enumerate(pictures_of(5_000))]
    write_parquet(tmp_path / "many", pictures)
    del base_args["--train_data_dir"], base_args["--forget_files"]
    forget = write_images(tmp_path / "forget", {"garment.png": garment_image()})
    flags = {"--dataset_name": str(tmp_path / "many"), "--forget_data_dir": str(forget), "--max_skipped_steps": "1"}
    return base_args | flags


def pictures_of(count: int) -> list[bytes]:
    """Digits, each with its number in its first pixels."""
    digits = digit_images()[0]
    numbered = [digits[row % len(digits)].copy() for row in range(count)]
    for row, pixels in enumerate(numbered):
        pixels[0, :2] = divmod(row, 256)
    return [png(pixels) for pixels in numbered]


def png(pixels: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_parquet(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    features = datasets.Features(image=datasets.Image(decode=False))
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    rows = datasets.Dataset.from_dict({"image": cells}, features).cast_column("image", datasets.Image())
    rows.to_parquet(folder / "train.parquet")


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The rows of --dataset_name whose pictures were decoded in this process."""
    rows, open_whole = [], Images.open

    def counted(images: Images, index: int) -> Image.Image:
        if images.flag == "--dataset_name":
            rows.append(index)
        return open_whole(images, index)

    monkeypatch.setattr(Images, "open", counted)
    return rows


class TestManyImages:
    PLANNED = (2 + 1) * 4

    def counts(self, folder: Path) -> dict:
        return json.loads((folder / "unlearning.json").read_text())["data"]

    def test_only_what_may_be_drawn_is_read(self, many, opened, tmp_path):
        main(to_argv(many))
        counts = self.counts(tmp_path / "out")
        assert len(set(opened)) == counts["checked"] < self.PLANNED + 10
        removed = counts["duplicates_removed"]
        assert counts["checked"] == self.PLANNED + removed and counts["keep"] == 5_000 - removed

    @pytest.mark.parametrize(
        "flags",
        [
            {"--calibrate_forgetting": None},
            {"--validation_steps": "2", "--num_validation_images": "4", "--ddpm_num_inference_steps": "2"},
            {"--method": "retrack", "--method_args": "num_neighbors=3"},
        ],
        ids=["calibration", "detectors", "neighbours"],
    )
    def test_a_copy_is_compared_once_and_used_never(self, flags, many, opened, tmp_path, monkeypatch):
        """Copies are opened twice, by the comparison; what is used is loaded once more."""
        monkeypatch.setattr(train_siss_unconditional, "MAX_NEIGHBOR_CANDIDATES", 300)
        monkeypatch.setattr(train_siss_unconditional, "MAX_DETECTOR_IMAGES", 300)
        main(to_argv(many | flags))
        times = Counter(opened)
        copies = [row for row in times if row % 10 == 0]
        assert len(copies) > 10 and all(times[row] == 2 for row in copies)
        assert sum(count > 2 for count in times.values()) > 100
        counts = self.counts(tmp_path / "out")
        assert counts["checked"] == len(times) < 900 and counts["duplicates_removed"] == len(copies)

    def test_more_steps_resume_the_same_run(self, many, tmp_path):
        """At step 2 the data were compared as far as the first run could go, and the second goes further."""
        main(to_argv(many | {"--max_train_steps": "6", "--output_dir": str(tmp_path / "whole")}))
        main(to_argv(many | {"--checkpointing_steps": "2"}))
        more = {"--max_train_steps": "6", "--resume_from_checkpoint": "latest", "--checkpointing_steps": "4"}
        main(to_argv(many | more))
        assert without_times(read_log(tmp_path / "out")) == without_times(read_log(tmp_path / "whole"))
        # And fewer steps than the checkpoint was made for.
        main(to_argv(many | more | {"--max_train_steps": "5"}))
        assert len(read_log(tmp_path / "out")) == 5

    def test_the_split_into_micro_batches_changes_nothing(self, many, tmp_path):
        main(to_argv(many))
        split = {"--train_batch_size": "1", "--gradient_accumulation_steps": "4"}
        main(to_argv(many | split | {"--output_dir": str(tmp_path / "split")}))
        assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "split"))
        assert self.counts(tmp_path / "out") == self.counts(tmp_path / "split")

    def test_what_is_not_drawn_may_be_changed_and_unreadable(self, many, opened, tmp_path, capfd):
        main(to_argv(many | {"--checkpointing_steps": "2"}))
        drawn = opened[-1]
        pictures = pictures_of(5_000)
        pictures[::10] = [png(garment_image())] * 500
        unused = next(row for row in range(5_000) if row not in opened)
        pictures[unused] = b"not a picture"
        more = many | {"--max_train_steps": "3", "--resume_from_checkpoint": "latest", "--max_skipped_steps": "1"}
        write_parquet(tmp_path / "many", pictures)
        main(to_argv(more))
        AcceleratorState._reset_state(reset_partial_state=True)
        pictures[drawn] = pictures_of(5_001)[-1]
        write_parquet(tmp_path / "many", pictures)
        assert_refused(main, more, "the images to keep are others (5000 then, 5000 now)", tmp_path, capfd)
        AcceleratorState._reset_state(reset_partial_state=True)
        pictures[drawn] = b"not a picture"
        write_parquet(tmp_path / "many", pictures)
        assert_refused(main, more, f"--dataset_name: cannot read image {drawn} (", tmp_path, capfd)


def test_resuming_with_what_changes_nothing_needs_no_leave(interrupted, digits_folder, tmp_path):
    """The same data elsewhere, the same pairs otherwise split, more steps at a constant rate."""
    moved = shutil.copytree(digits_folder, tmp_path / "moved")
    same = {"--train_data_dir": str(moved), "--train_batch_size": "2", "--gradient_accumulation_steps": "2"}
    main(to_argv(interrupted | same | {"--checkpointing_steps": "1", "--checkpoints_total_limit": "1"}))
    assert [line["step"] for line in read_log(tmp_path / "out")] == [1, 2, 3, 4]


def test_allowed_changes_take_effect(interrupted, tmp_path):
    changed = {"--learning_rate": "1e-3", "--lr_scheduler": "linear", "--forget_scale": "0.2"}
    main(to_argv(interrupted | changed | {"--allow_changes": None}))
    assert [line["lr"] for line in read_log(tmp_path / "out")] == pytest.approx([1e-4, 1e-4, 5e-4, 2.5e-4])
    report = json.loads((tmp_path / "out" / "unlearning.json").read_text())
    assert report["forget_scale"] == 0.2


def test_the_split_into_micro_batches_changes_nothing(base_args, tmp_path):
    main(to_argv(base_args | {"--train_batch_size": "8"}))
    split = base_args | {"--train_batch_size": "2", "--gradient_accumulation_steps": "4"}
    main(to_argv(split | {"--output_dir": str(tmp_path / "split")}))
    assert_same_gradients(read_log(tmp_path / "out"), read_log(tmp_path / "split"))


def test_checkpoints_rotate(base_args, tmp_path):
    flags = {"--max_train_steps": "4", "--checkpointing_steps": "1", "--checkpoints_total_limit": "2"}
    main(to_argv(base_args | flags))
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]
    assert not list((tmp_path / "out").rglob("*.pkl")) and not list((tmp_path / "out").rglob("*.bin"))


def test_overwrite_replaces_the_run_and_nothing_else(base_args, tmp_path):
    main(to_argv(base_args | {"--checkpointing_steps": "1"}))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    main(to_argv(base_args | {"--overwrite_output_dir": None, "--max_train_steps": "1"}))
    assert len(read_log(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


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
        assert self.count(tmp_path) == {"train": 6, "forget": 1, "keep": 5, "duplicates_removed": 0, "checked": 5}

    def test_value_of_a_class_column_in_a_local_data_set(self, base_args, tmp_path):
        write_images(tmp_path / "data" / "digit", {f"{i}.png": image for i, image in enumerate(digit_images()[0][:5])})
        write_images(tmp_path / "data" / "garment", {"a.png": garment_image(), "b.png": garment_image() // 2})
        del base_args["--forget_files"], base_args["--train_data_dir"]
        flags = {"--dataset_name": str(tmp_path / "data"), "--forget_column": "label", "--forget_value": "garment"}
        main(to_argv(base_args | flags | {"--max_train_steps": "1"}))
        assert self.count(tmp_path) == {"train": 7, "forget": 2, "keep": 5, "duplicates_removed": 0, "checked": 5}


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
        "--forget_timestep_ranges needs a keep side and a forget side, not --method neggrad",
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
    flags = base_args | {"--train_data_dir": str(data)} | flags
    flags = {flag: places.get(value, value) for flag, value in flags.items() if value is not ...}
    assert_refused(main, flags, expected, tmp_path, capfd)


def test_a_model_of_pickles_is_refused(base_args, tmp_path, capfd):
    model = shutil.copytree(TINY_MODEL, tmp_path / "pickled")
    torch.save(UNet2DModel.from_pretrained(model / "unet").state_dict(), model / "unet/diffusion_pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main(to_argv(base_args | {"--pretrained_model_name_or_path": str(model)})), "train")
    assert exit_info.value.code == 2
    assert "--pretrained_model_name_or_path" in capfd.readouterr().err


def test_gradients_that_never_become_finite_stop_the_run(base_args, tmp_path):
    model = UNet2DModel.from_pretrained(TINY_MODEL / "unet")
    model.conv_out.bias.data.fill_(torch.nan)
    broken = shutil.copytree(TINY_MODEL, tmp_path / "broken")
    model.save_pretrained(broken / "unet")
    with pytest.raises(RunError, match="3 steps in a row.*keep loss was not finite at timesteps.*starting model"):
        main(to_argv(base_args | {"--pretrained_model_name_or_path": str(broken), "--max_skipped_steps": "3"}))


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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

"""Runs that go on, are refused to go on, or are replaced."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState

from tests.helpers.commands import assert_refused, to_argv
from tests.helpers.paths import TINY_MODEL
from tests.helpers.runs import UNET, assert_resuming_changes_nothing, read_log
from train_siss_unconditional import main


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
    assert_resuming_changes_nothing(main, base_args | flags, UNET, tmp_path)


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

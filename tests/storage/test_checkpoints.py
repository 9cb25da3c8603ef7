import json
import os
import shutil

import pytest
import torch
from diffusers import UNet2DModel

from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.storage import tensors as tensors_module
from siss_diffusers.storage.checkpoints import (
    MANIFEST,
    damage,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    save_result,
    tidy,
)
from siss_diffusers.storage.files import append_json_line, truncate_json_lines
from siss_diffusers.storage.tensors import load_state, open_tensors, save_state, write_tensors
from tests.helpers.paths import TINY_MODEL


@pytest.mark.parametrize("file_bytes", [2**30, 100], ids=["one file", "several files"])
def test_optimizer_state_comes_back_bit_for_bit(file_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "MAX_FILE_BYTES", file_bytes)
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "thresholds": None, "floats": [0.1, float("inf")], "step": 3}
    save_state(tmp_path, state)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if file_bytes == 2**30 else 4)
    loaded = load_state(tmp_path)
    assert loaded["floats"] == [0.1, float("inf")] and loaded["thresholds"] is None and loaded["step"] == 3
    other = torch.optim.AdamW(model.parameters())
    for moments in loaded["optimizer"]["state"].values():
        moments |= {name: value[...] for name, value in moments.items()}
    other.load_state_dict(loaded["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], value), name


@pytest.mark.parametrize("file_bytes", [2**30, 100], ids=["one file", "several files"])
def test_diffusers_reads_the_files_and_rows_can_be_read_alone(file_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "MAX_FILE_BYTES", file_bytes)
    unet = UNet2DModel.from_pretrained(TINY_MODEL, subfolder="unet")
    unet.save_config(tmp_path)
    write_tensors(tmp_path, "diffusion_pytorch_model", unet.state_dict())
    loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
    for name, value in unet.state_dict().items():
        assert loaded[name].equal(value), name
    saved = open_tensors(tmp_path, "diffusion_pytorch_model")["conv_in.weight"]
    assert saved.shape == tuple(unet.conv_in.weight.shape)
    assert saved[slice(3, 5), slice(0, 1)].equal(unet.conv_in.weight[3:5, :1])


def test_a_failed_checkpoint_is_not_there_and_the_old_ones_are(tmp_path):
    save_checkpoint(tmp_path, 1, lambda folder: save_state(folder, {"step": 1}), total_limit=1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(RunError, match="disk full.*checkpoint-1 is whole"):
        save_checkpoint(tmp_path, 2, fail, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"


def test_checkpoints_sort_by_number_and_rotate(tmp_path):
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, lambda folder: save_state(folder, {}), total_limit=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"


def test_a_checkpoint_that_is_not_one(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(UsageError, match="--resume_from_checkpoint: nowhere is not a checkpoint.*none"):
        find_checkpoint(tmp_path, "nowhere")


def test_lines_of_steps_to_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "train_log.jsonl"
    truncate_json_lines(path, 1)
    assert not path.exists()
    for step in (1, 2, 3):
        append_json_line(path, {"step": step})
    truncate_json_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_kill_in_the_middle_of_a_line_costs_that_line_only(tmp_path):
    path = tmp_path / "train_log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    truncate_json_lines(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def save(folder, step, total_limit=None):
    state = {"step": step, "tensor": torch.arange(1000) + step}
    return save_checkpoint(folder, step, lambda path: save_state(path, state), total_limit)


def truncated(checkpoint):
    os.truncate(checkpoint / "state.safetensors", 100)


def missing(checkpoint):
    (checkpoint / "state.json").unlink()


def flipped(checkpoint):
    content = bytearray((checkpoint / "state.safetensors").read_bytes())
    content[-9] ^= 1
    (checkpoint / "state.safetensors").write_bytes(content)


def zeroed(checkpoint):
    """As some file systems leave a file after a loss of power."""
    size = (checkpoint / "state.json").stat().st_size
    (checkpoint / "state.json").write_bytes(bytes(size))


def without_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()


def torn_manifest(checkpoint):
    os.truncate(checkpoint / MANIFEST, 20)


@pytest.mark.parametrize("tear", [truncated, missing, flipped, zeroed, without_manifest, torn_manifest])
def test_latest_passes_over_what_is_torn_and_says_so(tear, tmp_path, caplog):
    for step in (2, 4):
        save(tmp_path, step)
    tear(tmp_path / "checkpoint-4")
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    assert "checkpoint-4 is passed over" in caplog.text
    with pytest.raises(UsageError, match="not whole"):
        find_checkpoint(tmp_path, "checkpoint-4")
    tidy(tmp_path, tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_going_back_sets_later_checkpoints_aside(tmp_path):
    """Or `latest` would mean one of the run that was given up, and rotation would remove the new ones first."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    tidy(tmp_path, tmp_path / "checkpoint-2")
    save(tmp_path, 3, total_limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-3",
        "superseded-checkpoint-4",
        "superseded-checkpoint-6",
    ]
    assert damage(tmp_path / "superseded-checkpoint-4") is None


def test_what_a_kill_left_unfinished_is_removed(tmp_path):
    save(tmp_path, 2)
    for name in ("tmp-checkpoint-4", "tmp-removed-checkpoint-1", "tmp-result"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / "tmp-mine").mkdir()
    tidy(tmp_path, tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "tmp-mine"]


def test_a_result_replaces_the_one_before_as_a_whole(tmp_path):
    def write(content):
        def into(folder):
            (folder / "unet").mkdir()
            (folder / "unet" / content).write_text(content)
            (folder / "model_index.json").write_text(content)

        return into

    save_result(tmp_path, write("old"), last="model_index.json")
    save_result(tmp_path, write("new"), last="model_index.json")
    assert [path.name for path in (tmp_path / "unet").iterdir()] == ["new"]

    def fail(folder):
        write("half")(folder)
        raise OSError("No space left on device")

    with pytest.raises(RunError, match="result could not be written.*start again"):
        save_result(tmp_path, fail, last="model_index.json")
    assert (tmp_path / "model_index.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "unet"]

import json

import pytest
import torch

from siss_diffusers.checkpoints import (
    append_json_line,
    find_checkpoint,
    list_checkpoints,
    load_state,
    save_checkpoint,
    save_state,
    truncate_json_lines,
)
from siss_diffusers.errors import RunError, UsageError


def test_optimizer_state_comes_back_bit_for_bit(tmp_path):
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "thresholds": None, "floats": [0.1, float("inf")], "step": 3}
    save_state(tmp_path, state)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = load_state(tmp_path)
    assert loaded["floats"] == [0.1, float("inf")] and loaded["thresholds"] is None and loaded["step"] == 3
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(loaded["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], value), name


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

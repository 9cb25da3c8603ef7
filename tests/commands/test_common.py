"""What the commands share."""

import pytest

from siss_diffusers.commands.common import (
    check_same_settings,
    count_of,
    read_object,
    read_prompts,
)
from siss_diffusers.errors import UsageError


def test_prompts_come_once_each_in_their_order(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("b\n\n  c \na\nb\n")
    assert read_prompts("--prompts", ["d", "a"], str(file)) == ["d", "a", "b", "c"]
    assert read_prompts("--prompts", None, None) == []
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="--prompts_file: cannot read"):
        read_prompts("--prompts", None, str(file))


def test_a_file_that_holds_no_object_is_refused(tmp_path):
    file = tmp_path / "audit.json"
    for content in ("[1]", "{", ""):
        file.write_text(content)
        with pytest.raises(UsageError, match="--audit: cannot read .*audit.json"):
            read_object("--audit", file)
    file.write_text('{"prompts": []}')
    assert read_object("--audit", file) == {"prompts": []}


def test_a_setting_that_only_the_interrupted_call_had_is_another():
    settings = {"seed": 0, "model": "x"}
    check_same_settings("out", "an audit with", settings, settings)
    for earlier in (settings | {"variant": "fp16"}, {"seed": 0}, settings | {"seed": 1}):
        with pytest.raises(UsageError, match="--output_dir: out holds an audit with another (variant|model|seed);"):
            check_same_settings("out", "an audit with", earlier, settings)


def test_one_is_singular():
    assert [count_of(number, "prompt") for number in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]

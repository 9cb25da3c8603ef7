"""What the commands share."""

import pytest

from siss_diffusers.commands.common import count_of, read_object, read_prompts, warn_of_long_prompts
from siss_diffusers.errors import UsageError


def test_prompts_come_once_each_in_their_order(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("b\n\n  c \na\nb\n")
    assert read_prompts("--prompts", ["d", "a"], str(file)) == ["d", "a", "b", "c"]
    assert read_prompts("--prompts", None, None) == []
    for blank in ("", " \n\r\n\t\n", "\ufeff\n", "\x1a\n"):
        file.write_text(blank)
        with pytest.raises(
            UsageError, match="--ordinary_prompts_file: .*prompts.txt holds no prompt; write one on each"
        ):
            read_prompts("--ordinary_prompts", ["a"], str(file))
    file.write_text("a\nb\x1a\n\x1a")
    assert read_prompts("--prompts", None, str(file)) == ["a", "b"]
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


def test_long_prompts_are_counted_and_not_shown(caplog):
    class TextModel:
        """A family that sees four letters."""

        def token_ids(self, pipeline, prompts):
            return [tuple(prompt[:4]) for prompt in prompts], [len(prompt) > 4 for prompt in prompts]

        def max_prompt_tokens(self, pipeline):
            return 4

    warn_of_long_prompts(TextModel(), None, ["long enough", "four", "secret"])
    assert caplog.messages == ["2 prompts are longer than the 4 tokens that are seen of each"]
    caplog.clear()
    warn_of_long_prompts(TextModel(), None, ["four"])
    warn_of_long_prompts(TextModel(), None, [])
    assert not caplog.messages


def test_one_is_singular():
    assert [count_of(number, "prompt") for number in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]

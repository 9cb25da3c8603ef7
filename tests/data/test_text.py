"""Text files as editors write them."""

import codecs

import pytest

from siss_diffusers.commands.common import read_prompts
from siss_diffusers.data.text import read_prompt_lines, split_lines
from siss_diffusers.errors import UsageError
from tests.helpers.untrusted import refusal


PROMPTS = ["a photo of a flower", "one\vtwo", "three\u2028four", "five\x85six", "a\x1cb", "naïve café"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        *((b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")),
        *((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")),
    ],
)
def test_a_prompt_is_what_stands_on_a_line(tmp_path, mark, encoding, end):
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + end.join([*PROMPTS, "", f"  {PROMPTS[0]} ", ""]).encode(encoding))
    assert read_prompts("--prompts", None, str(file)) == PROMPTS
    assert read_prompt_lines(file) == [*PROMPTS, PROMPTS[0]]


def test_a_mark_in_the_middle_is_none_of_a_prompt(tmp_path):
    """Of files that were put together."""
    (tmp_path / "a.txt").write_bytes(b"a\n\xef\xbb\xbfb\n")
    assert read_prompt_lines(tmp_path / "a.txt") == ["a", "b"]


@pytest.mark.parametrize("content", ["caf\u00e9".encode("latin-1"), "a b".encode("utf-16-le"), b"\xff\xfea"])
def test_another_encoding_is_refused_with_the_cure(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    message = refusal(read_prompts, "--paraphrases", None, str(tmp_path / "a.txt"))
    assert message.startswith("--paraphrases_file: cannot read") and "save it as UTF-8" in message


def test_a_folder_is_no_text_file(tmp_path):
    with pytest.raises(UsageError, match="--prompts_file: cannot read"):
        read_prompts("--prompts", None, str(tmp_path))


def test_lines_end_at_the_ends_of_lines_alone():
    assert split_lines("a\rb\r\nc\n\nd\ve\u2029f") == ["a", "b", "c", "", "d\ve\u2029f"]

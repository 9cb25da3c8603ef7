"""What commands wrote, and somebody else may have written since."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import siss_error


pytestmark = pytest.mark.usefixtures("no_network", "no_waiting")


class TestCuration:
    """`siss curate` reads what it wrote, and what somebody else may have written since."""

    def flip(self, capfd, folder: Path, content: str, name: str = "prompt000_0000.png") -> str:
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / "metadata.jsonl").write_text(content)
        return siss_error(capfd, "curate", "--output_dir", str(folder), "--flip", name)

    @pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", ""])
    def test_a_name_that_leads_elsewhere(self, tmp_path, capfd, name):
        line = json.dumps({"file_name": name, "text": "", "forget": False})
        assert "metadata.jsonl is not what" in self.flip(capfd, tmp_path, line, name or "a")
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["metadata.jsonl"]

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "1",
            "[]",
            "{}",
            '{"file_name": 1, "forget": true}',
            '{"file_name": "a.png", "forget": "no"}',
            '{"file_name": "a.png"}',
        ],
    )
    def test_lines_that_are_no_rows(self, tmp_path, capfd, line):
        assert "--output_dir" in self.flip(capfd, tmp_path, line)

    def test_a_picture_that_is_none(self, tmp_path, capfd):
        line = json.dumps({"file_name": "prompt000_0000.png", "text": "", "forget": False})
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "prompt000_0000.png").write_bytes(b"no")
        assert "prompt000_0000.png" in self.flip(capfd, tmp_path, line)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompts": 1}', '{"prompts": [{}]}'])
    def test_an_audit_that_is_none(self, tmp_path, capfd, content):
        (tmp_path / "audit.json").write_text(content)
        message = siss_error(
            *(capfd, "curate", "--pretrained_model_name_or_path", "x", "--audit", str(tmp_path)),
            *("--output_dir", str(tmp_path / "out")),
        )
        assert "--audit" in message


@pytest.mark.parametrize("content", ["", "[]", "\xff", "[" * 100_000])
@pytest.mark.parametrize("command, file", [("audit", "settings.json"), ("curate", "curation.json")])
def test_settings_that_are_none(tmp_path, capfd, command, file, content):
    (tmp_path / file).write_text(content, encoding="latin-1")
    flags = ["--pretrained_model_name_or_path", "x", "--prompts", "a", "--output_dir", str(tmp_path)]
    assert f"--output_dir: cannot read {tmp_path / file} (" in siss_error(capfd, command, *flags)

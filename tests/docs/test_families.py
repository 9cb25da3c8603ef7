"""docs/families.md lists every family, and its command lines are ones that the script takes."""

import re
import shlex

from siss_diffusers.families import FAMILIES
from siss_diffusers.flags import parse_settings
from siss_diffusers.settings import TextToImageSettings, resolve
from tests.helpers.paths import ROOT


PAGE = (ROOT / "docs" / "families.md").read_text()
WITH_PROMPTS = [family for family in FAMILIES if family.has_prompts]


def test_every_family_has_a_row_with_its_class_and_its_guidance():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| [")
    ]
    written = {row[1].strip("`"): float(row[-1]) for row in rows}
    assert written == {family.pipeline_class: family.default_guidance_scale for family in WITH_PROMPTS}


def test_the_command_lines_are_ones_that_the_script_takes():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.partition("\n## Command lines\n")[2], re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert len(commands) >= len(WITH_PROMPTS)
    for command in commands:
        script = command.index("train_siss_sd.py")
        assert command[:2] == ["accelerate", "launch"]
        settings, _, _ = resolve(parse_settings(TextToImageSettings, "", command[script + 1 :]))
        assert settings.pretrained_model_name_or_path.count("/") == 1

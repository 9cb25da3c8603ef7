"""`siss` itself: its help is quick, and a command is quiet but for what it does. In processes of their own, as for users."""

import ast
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

import siss_diffusers
from siss_diffusers.commands.cli import COMMANDS
from tests.helpers.imports import loaded_by


TINY_SD = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"
CALL = """
from siss_diffusers.commands.cli import main
try:
    main({argv})
except SystemExit as end:
    assert end.code in (None, 0), end.code
"""
MAX_CPU_SECONDS = 0.5  # a machine that is busy needs more of the clock, but not of the processor


def siss(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "siss_diffusers", *argv], capture_output=True, text=True)


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_quick_and_lists_every_command():
    before = cpu_seconds_of_children()
    result = siss("--help")
    assert cpu_seconds_of_children() - before < MAX_CPU_SECONDS
    assert result.returncode == 0 and not result.stderr
    text = " ".join(result.stdout.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.summary}" in text


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_no_library(argv):
    assert loaded_by(CALL.format(argv=argv)) == set()


def test_help_of_a_command_imports_no_other():
    code = CALL.format(argv=["audit", "--help"])
    code += "import sys; assert 'siss_diffusers.commands.audit' in sys.modules\n"
    code += "assert 'siss_diffusers.commands.curate' not in sys.modules"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_is_the_first_line_of_the_modules_docstring(name):
    source = Path(find_spec(COMMANDS[name].module).origin).read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring.splitlines()[0] == COMMANDS[name].summary


@pytest.mark.parametrize(("argv", "says"), [([], "COMMAND"), (["adit"], "adit"), (["audit"], "--pretrained_model")])
def test_a_bad_command_line_is_one_sentence(argv, says):
    result = siss(*argv)
    assert result.returncode == 2 and not result.stdout
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of the UNet alone, which diffusers would warn about."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = StableDiffusionPipeline.from_pretrained(TINY_SD).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_an_audit_says_what_it_does_and_nothing_else(adapter, tmp_path):
    result = siss(
        *("audit", "--pretrained_model_name_or_path", str(TINY_SD), "--adapter", str(adapter)),
        *("--prompts", "a flower", "--num_samples", "2", "--num_inference_steps", "2", "--output_dir"),
        str(tmp_path / "audit"),
    )
    assert result.returncode == 0 and result.stderr == ""  # no warning, and no progress bar of a single item
    first, second, *_ = result.stdout.splitlines()
    assert first == f"Loading {TINY_SD} and the adapter {adapter}" and second == "Sampling 1 prompt, 2 samples each"

"""What the hub's modules share with the others, and what they do not."""

import subprocess
import sys

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from siss_diffusers.storage.files import LORA_FILE


def test_the_name_of_an_adapter_is_that_of_diffusers():
    assert LORA_FILE == LORA_WEIGHT_NAME_SAFE


def test_what_is_imported():
    """`siss --help` imports the command without the Hub; the Hub's modules import neither commands nor training."""
    script = """
import argparse, sys
from siss_diffusers.commands import push
push.add_arguments(argparse.ArgumentParser())
before = set(sys.modules)
import siss_diffusers.hub.upload
print(sorted(name for name in before if name.startswith(("huggingface_hub", "siss_diffusers.hub"))))
added = set(sys.modules) - before
print(sorted(name for name in added if name.startswith(("siss_diffusers.commands", "siss_diffusers.training"))))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n[]\n"

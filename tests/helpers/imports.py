"""Which libraries a piece of code loads, in a process of its own."""

import subprocess
import sys


HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "peft", "PIL", "numpy", "tqdm"}
REPORT = "\nimport sys\nprint('loaded', *{name.partition('.')[0] for name in sys.modules})"


def loaded_by(code: str) -> set[str]:
    """Return which of the heavy libraries a new process has loaded after some code."""
    process = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=True)
    return HEAVY & {*process.stdout.splitlines()[-1].split()}

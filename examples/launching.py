"""What the demos share: running a training script as a user would."""

import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def launch(script: str, flags: dict[str, str | list[str] | None]) -> float:
    """`accelerate launch` the script on one process, whatever this machine is configured for; returns its seconds.

    Args:
        flags: a value or a list of them for each flag; None for a switch.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        str(ROOT / script),
    ]
    for flag, value in flags.items():
        command += [flag] if value is None else [flag, *value] if isinstance(value, list) else [flag, value]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started

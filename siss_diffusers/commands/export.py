"""Write an unlearning adapter in the format of another program, at the scale at which it was trained.

kohya: one file for A1111, Forge, ComfyUI and sd-scripts, of models with a UNet. comfyui: one file for ComfyUI. peft: a folder for
`PeftModel.from_pretrained`. The run itself has the format of diffusers.
"""

import argparse
from pathlib import Path

from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import path


FORMATS = ("kohya", "comfyui", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss export`."""
    parser.add_argument("run", type=path, metavar="RUN", help="The --output_dir of a finished run with --use_lora.")
    parser.add_argument("--format", choices=FORMATS, required=True, help="The format.")
    parser.add_argument("--output_dir", type=path, required=True, help="Where the file goes: a new folder.")


def main(args: argparse.Namespace) -> None:
    """Check the run, and write the file.

    Raises:
        UsageError: for bad input.
    """
    # Imported here because `siss --help` imports this module, and torch takes a while.
    from siss_diffusers.commands.common import check_unused_folder
    from siss_diffusers.exporting import Adapter, write
    from siss_diffusers.hub.contents import read_run
    from siss_diffusers.storage.files import LORA_FILE
    from siss_diffusers.storage.folders import made_folder

    run, folder = Path(args.run), Path(args.output_dir)
    read_run(run, None, None)
    if not (run / LORA_FILE).is_file():
        raise UsageError(f"{run} holds a whole pipeline, and there is no adapter to export")
    check_unused_folder(folder)
    adapter = Adapter.read(run)
    with made_folder("--output_dir", folder):
        file = write(adapter, args.format, folder, run.resolve().name)
    print(f"Saved {len(adapter.layers)} layers to {file}")

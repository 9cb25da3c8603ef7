"""Make an unlearning adapter part of its base: a whole pipeline, from which the adapter cannot be taken out again.

Every other file of the base is copied as it is, and weights keep their precision. `siss push` publishes the result. This is
the way where a deletion must not be undone: whoever leaves an adapter out has the base again.
"""

import argparse
from pathlib import Path

from siss_diffusers.commands.common import add_model_arguments
from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import non_negative_float, path


BASE_FLAG = "--base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss fuse`."""
    parser.add_argument("run", type=path, metavar="RUN", help="The --output_dir of a finished run with --use_lora.")
    parser.add_argument(
        BASE_FLAG,
        type=path,
        help="The pipeline that it was trained on: a folder, or a name on the Hub. Default: the name"
        " in its unlearning.json.",
    )
    parser.add_argument("--output_dir", type=path, required=True, help="Where the pipeline goes: a new folder.")
    parser.add_argument(
        "--scale",
        type=non_negative_float,
        default=1.0,
        help="Strength of the adapter; default: %(default)s, as it was trained.",
    )
    parser.add_argument("--cache_dir", type=path, help="Where downloaded models are kept.")
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Check the run, fuse, and save.

    Raises:
        UsageError: for bad input.
    """
    # Imported here because `siss --help` imports this module, and torch takes a while.
    from siss_diffusers.commands.common import check_unused_folder
    from siss_diffusers.families import NamedPipeline, find_family
    from siss_diffusers.fusing import fuse
    from siss_diffusers.hub.contents import read_run
    from siss_diffusers.storage.files import LORA_FILE, write_json
    from siss_diffusers.storage.folders import made_folder

    run, folder = Path(args.run), Path(args.output_dir)
    record, _ = read_run(run, None, None)
    if not (run / LORA_FILE).is_file():
        raise UsageError(f"{run} holds a whole pipeline, and there is no adapter to fuse; publish it as it is")
    name, where = args.base, {"revision": args.revision, "variant": args.variant}
    if name is None:
        name = record.get("base_model")
        where = {key: value or record.get(f"base_{key}") for key, value in where.items()}
    if name is None:
        raise UsageError(
            f"{BASE_FLAG} is needed: the run was trained on a local folder; name the base of its training"
        )
    check_unused_folder(folder)
    source = NamedPipeline(name, BASE_FLAG, **where, cache_dir=args.cache_dir)
    family = find_family(source).from_source(source)
    with made_folder("--output_dir", folder):
        fuse(source, family, run, folder, args.scale)
        # Last: a folder with it is finished.
        write_json(folder / "unlearning.json", record | {"fused_scale": args.scale})
    print(
        f"Saved the fused pipeline to {folder}; measure it by `siss evaluate --unlearned {folder}`, publish it by `siss push`"
    )

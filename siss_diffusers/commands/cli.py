"""The console script `siss`: `siss audit`, `siss curate`, `siss evaluate`, `siss export`, `siss fuse`,
`siss push`."""

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import Parser
from siss_diffusers.process import run
from siss_diffusers.quiet import quiet_loading


@dataclass(frozen=True)
class Command:
    """A command of `siss`, whose module is imported when it is chosen.

    Args:
        module: has `add_arguments(parser)` and `main(args)`; its docstring is the text of `siss COMMAND --help`.
        summary: its line in `siss --help`, the first of that docstring.
        runs_models: it needs the packages of the extra `eval`, and a device.
    """

    module: str
    summary: str
    runs_models: bool = True


COMMANDS = {
    "audit": Command(
        "siss_diffusers.commands.audit",
        "Rank prompts by how strongly a text-to-image model memorized an image for them.",
    ),
    "curate": Command(
        "siss_diffusers.commands.curate",
        "Build the image folder to unlearn from: sample a prompt and mark the samples that are the memorized image.",
    ),
    "evaluate": Command(
        "siss_diffusers.commands.evaluate",
        "Measure what a model forgot and what it kept: base and unlearned models, on the same seeds.",
    ),
    "export": Command(
        "siss_diffusers.commands.export",
        "Write an unlearning adapter in the format of another program, at the scale at which it was trained.",
        runs_models=False,
    ),
    "fuse": Command(
        "siss_diffusers.commands.fuse",
        "Make an unlearning adapter part of its base: a whole pipeline, from which the adapter cannot be taken out again.",
        runs_models=False,
    ),
    "push": Command(
        "siss_diffusers.commands.push",
        "Publish a finished run on the Hugging Face Hub: the model, its card, `unlearning.json` and `evaluation.json`.",
        runs_models=False,
    ),
}


def build_parser(chosen: str | None) -> Parser:
    """Build the parser of `siss`, with the flags of the chosen command only: importing the others takes time."""
    parser = Parser(
        prog="siss",
        description=(
            "Find what a diffusion model memorized, build the set to forget, measure that it is gone, and publish."
        ),
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary)
        if name == chosen:
            module = import_module(command.module)
            subparser.description = module.__doc__
            module.add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name.

    Args:
        argv: the arguments; those of this program by default.

    Raises:
        UsageError: for bad input, or a package that is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(chosen).parse_args(argv)
    command = COMMANDS[args.command]
    module = import_module(command.module)
    if not command.runs_models:
        return module.main(args)
    for package, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("scipy", "scipy")):
        if find_spec(package) is None:
            raise UsageError(f"`siss {args.command}` needs {name}: pip install 'siss_diffusers[eval]'")
    start_processes()
    with quiet_loading():
        module.main(args)


def start_processes() -> None:
    """Make accelerate's state of all processes. By itself it does not read whether the launcher wants CPUs.

    Raises:
        UsageError: where the processes of the launch do not know of each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from siss_diffusers.distributed import PATIENCE, check_launch

    check_launch(PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).num_processes)


def cli() -> None:
    """Run `siss` as a program: exit with a code, and say one sentence for bad input."""
    run(main, "siss")

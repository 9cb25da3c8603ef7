"""The console script `siss`: `siss audit`, `siss curate`, `siss evaluate`, `siss push`."""

from importlib.util import find_spec

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from siss_diffusers.commands import audit, curate, evaluate, push
from siss_diffusers.errors import UsageError
from siss_diffusers.flags import Parser
from siss_diffusers.process import run


COMMANDS = {"audit": audit, "curate": curate, "evaluate": evaluate, "push": push}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="siss",
        description=(
            "Find what a diffusion model memorized, build the set to forget, measure that it is gone, and publish."
        ),
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args(argv)
    if args.command == "push":
        return push.main(args)
    for package, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("scipy", "scipy")):
        if find_spec(package) is None:
            raise UsageError(f"`siss {args.command}` needs {name}: pip install 'siss_diffusers[eval]'")
    # The state of all processes is made here, for it does not read by itself whether the launcher wants CPUs.
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    COMMANDS[args.command].main(args)


def cli() -> None:
    run(main, "siss")

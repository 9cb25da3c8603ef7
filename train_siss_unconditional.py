"""Unlearn training images from an unconditional diffusion model; mirrors diffusers' train_unconditional.py."""

from siss_diffusers.flags import parse_settings
from siss_diffusers.process import program_name, run
from siss_diffusers.settings import UnconditionalSettings


DESCRIPTION = "Unlearn training images from an unconditional diffusion model."


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(UnconditionalSettings, DESCRIPTION, argv)
    # Imported once the flags are read: --help needs neither diffusers nor accelerate.
    from siss_diffusers.unlearning import unlearn_from_settings

    unlearn_from_settings(settings, with_prompts=False)


def cli() -> None:
    run(main, program_name())


if __name__ == "__main__":
    cli()

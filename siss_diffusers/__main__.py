"""Run `siss` as `python -m siss_diffusers`."""

from siss_diffusers.commands.cli import cli


if __name__ == "__main__":
    cli()

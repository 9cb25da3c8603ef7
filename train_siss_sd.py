"""Unlearn training images from a text-to-image model, such as Stable Diffusion, by LoRA or in full; mirrors diffusers'
train_text_to_image.py and train_text_to_image_lora.py."""

from siss_diffusers.flags import parse_settings
from siss_diffusers.process import program_name, run
from siss_diffusers.settings import TextToImageSettings


DESCRIPTION = "Unlearn training images from a text-to-image model, such as Stable Diffusion."


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(TextToImageSettings, DESCRIPTION, argv)
    # Imported once the flags are read: --help needs neither diffusers nor accelerate.
    from siss_diffusers.unlearning import unlearn_from_settings

    unlearn_from_settings(settings, with_prompts=True)


def cli() -> None:
    run(main, program_name())


if __name__ == "__main__":
    cli()

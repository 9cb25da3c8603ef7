"""Flags of the training scripts, made from the fields of their settings."""

import argparse
from dataclasses import MISSING, Field, fields
from typing import TypeVar

from siss_diffusers.parsing import Parser
from siss_diffusers.process import program_name
from siss_diffusers.settings import Settings, flag_name


SettingsType = TypeVar("SettingsType", bound=Settings)
REQUIRED = ("pretrained_model_name_or_path",)


def parse_settings(
    settings_class: type[SettingsType], description: str, argv: list[str] | None = None
) -> SettingsType:
    """Parse a command line into settings; on a bad argument print one sentence and exit with code 2."""
    parser = Parser(prog=program_name(), description=description)
    add_flags(parser, settings_class)
    return settings_class(**vars(parser.parse_args(argv)))


def add_flags(parser: argparse.ArgumentParser, settings_class: type[Settings]) -> None:
    """Add a flag for each setting, in the group of each."""
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for field in fields(settings_class):
        metadata = field.metadata
        title = metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        names = [f"--{name}" for name in (flag_name(field), *metadata["aliases"])]
        options = {"dest": field.name, "default": field.default, "help": help_of(field).replace("%", "%%")}
        if field.name in REQUIRED:
            options |= {"required": True, "default": None}
        if field.type is bool:
            options["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        elif field.type == bool | None:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = metadata["parse"]
            for name in ("choices", "nargs", "const", "metavar"):
                if metadata[name] is not None:
                    options[name] = metadata[name]
        assert field.default is not MISSING
        groups[title].add_argument(*names, **options)


def help_of(field: Field) -> str:
    """Return the help of a setting, with its default where there is one that the help does not explain."""
    text = field.metadata["help"]
    is_told = field.type is bool or field.default in (None, "", ()) or "default" in text.lower()
    return text if is_told else f"{text.removesuffix('.')}; default: {field.default}."

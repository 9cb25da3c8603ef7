"""A setting is one dataclass field: the flag, its check, its help, its resume rule, and whether it may be published."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from siss_diffusers.errors import UsageError


# How a resumed run may differ from the one that wrote the checkpoint:
# `same`: only with --allow_changes; `free`: it may; `length`: it may unless a schedule depends on the length of the run;
# `fixed`: never, the saved state could not be read.
ResumeRule = Literal["same", "free", "length", "fixed"]


def setting(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] = str,
    choices: Collection[str] | None = None,
    nargs: int | str | None = None,
    const: Any = None,
    metavar: str | tuple[str, ...] | None = None,
    flag: str | None = None,
    aliases: Sequence[str] = (),
    group: str | None = None,
    resume: ResumeRule = "same",
    public: bool = False,
) -> Any:
    """Declare a setting as a field of a settings class.

    Args:
        default: value where none is given; None often means that it depends on other settings.
        help: one or two sentences for `--help` and the docs.
        parse: from text to the value; raises `argparse.ArgumentTypeError` saying what it must be.
        choices: the values that are allowed.
        nargs, const, metavar: as in argparse.
        flag: the name of the flag, where it is not that of the field.
        aliases: other names of the flag.
        group: section of `--help`; None is the main one.
        resume: how a resumed run may differ.
        public: whether the value may be published. It must tell nothing about what is forgotten.
    """
    metadata = {
        "help": help,
        "parse": parse,
        "choices": choices,
        "nargs": nargs,
        "const": const,
        "metavar": metavar,
        "flag": flag,
        "aliases": tuple(aliases),
        "group": group,
        "resume": resume,
        "public": public,
    }
    return dataclasses.field(default=default, metadata=metadata)


def switch(help: str, **options: Any) -> Any:
    """Declare a setting that is off by default."""
    return setting(False, help, **options)


def flag_name(field: dataclasses.Field) -> str:
    """Return the name of a setting in flags, `unlearning.json` and checkpoints."""
    return field.metadata["flag"] or field.name


def check_value(field: dataclasses.Field, value: Any) -> Any:
    """Check a value that did not come through a parser, such as an argument of `unlearn(...)`.

    Returns:
        The value, as a parser would have returned it.

    Raises:
        UsageError: naming the setting and what it must be.
    """
    metadata = field.metadata
    if value is None or field.type in (bool, "bool"):
        if value is not None and not isinstance(value, bool):
            raise UsageError(f"{field.name} must be True or False, not {value!r}")
        return value
    try:
        if metadata["nargs"] in (None, "?"):
            checked = value if value == metadata["const"] else metadata["parse"](str(value))
            values = [checked]
        else:
            if isinstance(value, str):
                value = [value]
            # Pairs, as of timestep ranges, are flattened: (300, 1000) or [(300, 1000), (0, 300)].
            flat = [part for item in value for part in (item if isinstance(item, tuple | list) else [item])]
            checked = values = [metadata["parse"](str(part)) for part in flat]
    except Exception as error:
        raise UsageError(f"{field.name} {error}")
    if metadata["choices"] is not None:
        for part in values:
            if part not in metadata["choices"]:
                raise UsageError(f"{field.name} must be one of {', '.join(metadata['choices'])}, not {part!r}")
    return checked

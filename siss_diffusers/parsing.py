"""Argument parsers: one sentence for a bad argument, and the types of arguments. Nothing heavy is imported here."""

import argparse
import math
import os
from typing import NoReturn, Protocol

from siss_diffusers.errors import UsageError, one_line


class Parser(argparse.ArgumentParser):
    """Prints one sentence for a bad argument instead of the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see --help\n")


def path(text: str) -> str:
    """Parse a path, or a name on the Hub: `~` at its start means home, also where no shell has seen it."""
    return os.path.expanduser(text)


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1.

    Raises:
        ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def natural_number(text: str) -> int:
    """Parse a whole number of at least 0.

    Raises:
        ArgumentTypeError: for anything else.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text}")
    return int(text)


def seed_number(text: str) -> int:
    """Parse a seed that every library accepts, a whole number below 2^32.

    Raises:
        ArgumentTypeError: for anything else.
    """
    value = natural_number(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, not {text}")
    return value


def float_or_nan(text: str) -> float:
    """Return the number that a text is; NaN for none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def finite_float(text: str) -> float:
    """Parse a finite number.

    Raises:
        ArgumentTypeError: for anything else.
    """
    value = float_or_nan(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0.

    Raises:
        ArgumentTypeError: for anything else.
    """
    value = float_or_nan(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number not below 0, not {text}")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0.

    Raises:
        ArgumentTypeError: for anything else.
    """
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def unit_float(text: str) -> float:
    """Parse a number in [0, 1].

    Raises:
        ArgumentTypeError: for anything else.
    """
    value = non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], not {text}")
    return value


def quantile_or_off(text: str) -> float | str:
    """Parse a number in [0, 1], or `off`.

    Raises:
        ArgumentTypeError: for anything else.
    """
    return text if text == "off" else unit_float(text)


# What the network can be told of a forget image in training.
CONDITION_KINDS = ("prompt", "empty", "other", "gauss", "adversarial")


def condition_shares(text: str) -> dict[str, float]:
    """Parse shares of kinds of condition, such as `prompt:0.5,empty:0.5`.

    Raises:
        ArgumentTypeError: for an unknown kind, or shares that do not sum to 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, _, share = part.partition(":")
        if kind not in CONDITION_KINDS or kind in shares:
            raise argparse.ArgumentTypeError(
                f"must name each of {', '.join(CONDITION_KINDS)} at most once, as in prompt:0.5,empty:0.5, not {part!r}"
            )
        shares[kind] = unit_float(share)
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"must have shares that sum to 1, not to {sum(shares.values()):g}")
    return shares


# The flags that say which images to forget, of the scripts and of `siss evaluate`.
FORGET_SET_HELP = {
    "forget_data_dir": "A folder of images to forget; copies of them are not kept.",
    "forget_files": "Files within --train_data_dir to forget.",
    "forget_column": "A column of the data set that says what to forget; default: a boolean column `forget`, if any.",
    "forget_value": "Forget the rows with this value in --forget_column.",
}


class ForgetSetArguments(Protocol):
    """Holds what the flags of the forget set were given."""

    forget_data_dir: str | None
    forget_files: list[str] | None
    forget_column: str | None
    forget_value: str | None
    train_data_dir: str | None


def add_forget_set_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags that say which images to forget."""
    options = {"forget_data_dir": {"type": path}, "forget_files": {"type": path, "nargs": "+"}}
    for name, text in FORGET_SET_HELP.items():
        group.add_argument(f"--{name}", help=text, **options.get(name, {}))


def check_forget_set_arguments(args: ForgetSetArguments) -> None:
    """Check the flags of the forget set against each other.

    Raises:
        UsageError: for flags that exclude or need each other.
    """
    given = [
        flag
        for flag, value in (
            ("--forget_data_dir", args.forget_data_dir),
            ("--forget_files", args.forget_files),
            ("--forget_column", args.forget_column),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give one")
    if args.forget_value is not None and args.forget_column is None:
        raise UsageError("--forget_value needs --forget_column")
    if args.forget_files and args.train_data_dir is None:
        raise UsageError("--forget_files needs --train_data_dir, which they are part of")

"""Argument parsers: one sentence for a bad argument, and the types of arguments. Nothing heavy is imported here."""

import argparse
import math
from typing import NoReturn

from siss_diffusers.errors import UsageError, one_line


class Parser(argparse.ArgumentParser):
    """Prints one sentence for a bad argument instead of the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see --help\n")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def natural_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text}")
    return int(text)


def seed_number(text: str) -> int:
    """What every library that draws takes for a seed."""
    value = natural_number(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, not {text}")
    return value


def non_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number not below 0, not {text}")
    return value


def positive_float(text: str) -> float:
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def unit_float(text: str) -> float:
    value = non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], not {text}")
    return value


def quantile_or_off(text: str) -> float | str:
    return text if text == "off" else unit_float(text)


def add_forget_set_arguments(group: argparse._ActionsContainer) -> None:
    """Which images are to forget."""
    group.add_argument(
        "--forget_data_dir", type=str, default=None, help="A folder of images to forget; copies of them are not kept."
    )
    group.add_argument(
        "--forget_files", type=str, nargs="+", default=None, help="Files within --train_data_dir to forget."
    )
    group.add_argument(
        "--forget_column",
        type=str,
        default=None,
        help="A column of the data set that says what to forget. A boolean column `forget` is used without asking.",
    )
    group.add_argument(
        "--forget_value", type=str, default=None, help="Forget the rows with this value in --forget_column."
    )


def check_forget_set_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: for flags of the forget set that exclude or need each other.
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

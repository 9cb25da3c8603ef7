"""What the commands of `siss` share. Libraries are imported inside the functions, so that `--help` is quick."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.parsing import non_negative_float, positive_int, seed_number
from siss_diffusers.storage.files import read_json


if TYPE_CHECKING:
    from siss_diffusers.data.prompt_lists import PromptList
    from siss_diffusers.families import Family, NamedPipeline, Sampling

MODEL_FLAG = "--pretrained_model_name_or_path"
LIST_FORMATS = "lines of text, .csv, .jsonl or .parquet"


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say which files of a model are read, under the names that the training scripts use."""
    parser.add_argument("--revision", help="Revision of the model on the Hub.")
    parser.add_argument("--variant", help="Variant of the model's files, such as fp16.")


def add_sampling_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the flags that say how samples are drawn, under the names that the training script uses.

    Args:
        batch_size: default of `--batch_size`.
    """
    parser.add_argument("--seed", type=seed_number, default=0, help="Seed of the first sample; default: %(default)s.")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, default=50, help="DDIM steps; default: %(default)s."
    )
    parser.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        help="Guidance; default: that of the model's pipeline, such as 7.5 for Stable Diffusion 1.x.",
    )
    parser.add_argument("--resolution", type=positive_int, help="Side of the pictures; default: the model's own.")
    parser.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="Samples at a time; default: %(default)s."
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="Precision of the model; default: %(default)s.",
    )


def sampling_settings(args: argparse.Namespace) -> "Sampling":
    """Return what the flags of `add_sampling_arguments` say, once `fill_in_guidance` has seen them."""
    from siss_diffusers.families import Sampling

    return Sampling(args.num_inference_steps, args.guidance_scale, args.batch_size, args.seed)


def fill_in_guidance(args: argparse.Namespace, family: "Family") -> None:
    """Fill in the guidance scale, where none was given, by that of the family."""
    if args.guidance_scale is None:
        args.guidance_scale = family.default_guidance_scale


def open_text_to_image_model(args: argparse.Namespace) -> tuple["NamedPipeline", "Family"]:
    """Read the configurations of a pipeline that takes prompts, and no weights.

    Args:
        args: with the flags of the model and of its samples.

    Returns:
        The pipeline, which is not loaded yet, and its family.

    Raises:
        UsageError: for a pipeline that is not supported, or that does not take this resolution.
    """
    from siss_diffusers.families import NamedPipeline, find_family

    where = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    source = NamedPipeline(args.pretrained_model_name_or_path, MODEL_FLAG, **where)
    family = find_family(source, with_prompts=True).from_source(source, args.resolution)
    fill_in_guidance(args, family)
    return source, family


def load_pipeline(source: "NamedPipeline", family: "Family", dtype: str, adapter: str | None = None) -> Any:
    """Load a pipeline onto the device of this process, with an adapter in it if one is named.

    Args:
        dtype: name of a floating dtype of torch.

    Raises:
        UsageError: for files that cannot be read, or must not be.
    """
    import torch
    from accelerate import PartialState

    from siss_diffusers.families.loading import load_for_sampling

    announce(f"Loading {source.describe()}" + ("" if adapter is None else f" and the adapter {adapter}"))
    return load_for_sampling(source, family, PartialState().device, getattr(torch, dtype), adapter)


def settings_of_samples(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that samples depend on, by which a later call knows whether it may go on with them.

    Args:
        names: of flags, beside those that say which model is sampled.
    """
    optional = {name: getattr(args, name) for name in ("revision", "variant")}
    settings = {name: getattr(args, name) for name in names} | {"model": args.pretrained_model_name_or_path}
    return settings | {name: value for name, value in optional.items() if value is not None}


def check_same_settings(output_dir: Path, holds: str, earlier: dict, settings: dict) -> None:
    """Check that an interrupted call was made with these settings.

    Args:
        holds: what the folder holds, up to the names of the settings that differ, for the message.
        earlier: the settings of the interrupted call.

    Raises:
        UsageError: naming the settings that differ.
    """
    differing = [name for name in settings | earlier if earlier.get(name) != settings.get(name)]
    if differing:
        raise UsageError(
            f"--output_dir: {output_dir} holds {holds} another {', '.join(differing)}; name another folder"
        )


def check_unused_folder(output_dir: Path) -> None:
    """Check that there is no folder yet, or an empty one.

    Raises:
        UsageError: for a file, or a folder that holds something.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"--output_dir: {output_dir} is a file, or a folder that is not empty; name another folder")


def announce(message: str) -> None:
    """Print a line on the main process, at once."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(message, flush=True)


def count_of(number: int, noun: str) -> str:
    """Return a number and its noun: `1 prompt`, `2 prompts`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def read_object(flag: str, file: Path) -> dict:
    """Read a JSON file that an earlier command left.

    Raises:
        UsageError: if it cannot be read, or holds no object.
    """
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); remove it")
    return content


def read_prompts(
    flag: str, prompts: Sequence[str] | None, file: str | None, prompt_column: str | None = None
) -> list[str]:
    """Return the prompts of the command line and of a list, each once, in their order.

    Args:
        flag: of the prompts; that of the list ends in `_file`.
        prompt_column: of the list, where it has columns; None for one called text, caption or prompt.

    Raises:
        UsageError: if the list cannot be read, or holds no prompt.
    """
    from siss_diffusers.data.prompt_lists import PromptList, has_columns, read_prompt_list

    listed = PromptList([])
    if file is not None:
        # A list of lines has no columns; the flag is then for another list.
        column = prompt_column if has_columns(file) else None
        listed = read_prompt_list(f"{flag}_file", file, column)
        announce_rows_without_prompt(f"{flag}_file", listed)
    return list(dict.fromkeys([*(prompts or []), *listed.prompts]))


def announce_rows_without_prompt(flag: str, listed: "PromptList") -> None:
    """Say how many rows of a list hold no prompt."""
    if listed.without:
        announce(f"{flag}: {count_of(listed.without, 'row')} without a prompt left out")

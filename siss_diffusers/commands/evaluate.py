"""Measure what a model forgot and what it kept: base and unlearned models, on the same seeds.

Takes text-to-image pipelines and adapters, or unconditional pipelines. Writes `evaluation.json`, `report.html` and
pictures. The forget set is named as for the training scripts. docs/evaluation.md says what each figure means and how far
it can be trusted.
"""

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siss_diffusers.commands.common import (
    add_model_arguments,
    add_sampling_arguments,
    fill_in_guidance,
    read_prompts,
)
from siss_diffusers.commands.metric_flags import add_metric_arguments
from siss_diffusers.errors import UsageError
from siss_diffusers.evaluation.settings import EvaluationSettings
from siss_diffusers.parsing import (
    add_forget_set_arguments,
    check_forget_set_arguments,
    natural_number,
    path,
    positive_int,
)
from siss_diffusers.storage.folders import made_folder, refuse_folder_within


if TYPE_CHECKING:
    from siss_diffusers.families import Family

# Flags that unconditional models do not have.
OF_PROMPTS = (*("resolution", "dtype", "guidance_scale", "num_ordinary_samples", "paraphrases_file", "prompt_noise"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--base", type=path, required=True, help="The model before: a pipeline, as a folder or a name on the Hub."
    )
    parser.add_argument(
        "--unlearned", type=path, required=True, help="The model after: a pipeline, or an adapter for the base."
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME=MODEL",
        help="More models or adapters to put beside them, such as one that never saw the images.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--output_dir", type=path, default="evaluation", help="Where the report goes; default: %(default)s."
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the report in --output_dir.")
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", type=path, help="The training set: a folder of images.")
    data.add_argument("--dataset_name", type=path, help="The training set: a name on the Hub, or a local folder.")
    data.add_argument("--dataset_config_name", help="The configuration of the data set.")
    data.add_argument("--image_column", default="image", help="The column of the images; default: %(default)s.")
    data.add_argument("--caption_column", default="text", help="The column of the prompts; default: %(default)s.")
    data.add_argument("--cache_dir", type=path, help="Where downloaded models and data sets are kept.")
    add_forget_set_arguments(data)
    data.add_argument(
        "--drop_near_duplicates",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Leave near copies of forget images out of the keep set, as in training.",
    )
    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--num_samples",
        type=positive_int,
        default=EvaluationSettings.num_samples,
        help="Samples of each model; of a text-to-image model, of the forget images' prompts together. Default:"
        " %(default)s.",
    )
    samples.add_argument(
        "--num_ordinary_samples",
        type=natural_number,
        default=EvaluationSettings.num_ordinary_samples,
        help="Text-to-image models: samples of the keep images' other prompts together. Default: %(default)s.",
    )
    add_sampling_arguments(samples, batch_size=EvaluationSettings.batch_size)
    add_metric_arguments(parser.add_argument_group("metrics"))


def main(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: for bad input, before any model is loaded.
    """
    from accelerate import PartialState

    from siss_diffusers.data.split import DataSource
    from siss_diffusers.evaluation import evaluate, format_summary, split_to_measure, write_evaluation

    models = check_arguments(args)
    with made_folder("--output_dir", args.output_dir):
        family, loaders = find_models(args, models)
        settings = make_settings(args)
        split = split_to_measure(
            DataSource.of(args).load(),
            family,
            seed=args.seed,
            drop_near_duplicates=args.drop_near_duplicates,
            caption_column=args.caption_column,
        )
        evaluation = evaluate(family, loaders, split, settings)
    if not PartialState().is_main_process:
        return
    evaluation.settings["unlearned_weights"] = digest_of_folder(args.unlearned)
    report = write_evaluation(Path(args.output_dir), evaluation)
    print(f"\n{format_summary(evaluation.content)}")
    print(f"\nThe report, with intervals and what was left out: {report}")


def check_arguments(args: argparse.Namespace) -> dict[str, str]:
    """Check what needs neither models nor data.

    Returns:
        Where each model is, by its name.

    Raises:
        UsageError: naming the flag.
    """
    from siss_diffusers.data.split import DataSource

    DataSource.of(args).check()
    check_forget_set_arguments(args)
    models = {"base": args.base, "unlearned": args.unlearned}
    for entry in args.also:
        name, _, where = entry.partition("=")
        # The name becomes part of a file's name.
        if not re.fullmatch(r"[\w.-]+", name) or not where or name in (*models, "settings"):
            raise UsageError(f"--also takes NAME=MODEL, every NAME once, of letters, digits, ., _ and -, not {entry}")
        models[name] = path(where)
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir: {output_dir} is a file; name a folder")
    read = ("train_data_dir", "dataset_name", "forget_data_dir")
    refuse_folder_within("--output_dir", output_dir, {f"--{name}": getattr(args, name) for name in read})
    if output_dir.exists() and not args.overwrite_output_dir and any(output_dir.iterdir()):
        raise UsageError(f"--output_dir: {output_dir} is not empty; add --overwrite_output_dir or name another folder")
    return models


def find_models(args: argparse.Namespace, models: dict[str, str]) -> tuple["Family", dict[str, Any]]:
    """Read the configurations of the models.

    Args:
        models: where each model is, by its name.

    Returns:
        The family of all of them, and for each model a function that loads it onto the device.

    Raises:
        UsageError: for a model that cannot be read, or that cannot be compared with the base.
    """
    from functools import partial

    import torch
    from accelerate import PartialState

    from siss_diffusers.families import NamedPipeline, find_family
    from siss_diffusers.families.loading import load_for_sampling
    from siss_diffusers.families.trust import is_adapter

    where_base = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    base = NamedPipeline(args.base, "--base", **where_base)
    family_class = find_family(base)
    if not family_class.has_prompts:
        refuse_flags_of_prompts(args, family_class.title)
    family = family_class.from_source(base, args.resolution)
    fill_in_guidance(args, family)
    loaders = {}
    for name, where in models.items():
        flag = f"--{name}" if name in ("base", "unlearned") else "--also"
        source, adapter = base, {}
        if name != "base":
            if family.lora_targets and is_adapter(where, flag):
                adapter = {"adapter": where, "adapter_flag": flag}
            else:
                source = NamedPipeline(where, flag, variant=variant_of(where, args), cache_dir=args.cache_dir)
                if find_family(source) is not family_class:
                    raise UsageError(f"{flag}: {where} is not {family.title}, as the base is")
                if family_class.from_source(source, args.resolution) != family:
                    raise UsageError(
                        f"{flag}: {where} makes pictures of another size than the base, or is told other things"
                    )
        dtype, device = getattr(torch, args.dtype), PartialState().device
        loaders[name] = partial(load_for_sampling, source, family, device, dtype, **adapter)
    return family, loaders


def variant_of(where: str, args: argparse.Namespace) -> str | None:
    """Return the variant to read a model in: that of `--variant` where a folder has nothing else, as a copy of the base
    may have. What training saves is always plain."""
    from siss_diffusers.families.causes import variants_in

    files = [file.name for file in Path(where).glob("*/*.safetensors")]
    return args.variant if args.variant in variants_in(files) and None not in variants_in(files) else None


def refuse_flags_of_prompts(args: argparse.Namespace, title: str) -> None:
    """Refuse flags that an unconditional model does not have.

    Raises:
        UsageError: naming the flag.
    """
    if args.embedding_attack:
        raise UsageError(
            f"--embedding_attack searches a text conditioning, and the base is {title}; drop it: the injection, which is"
            " always measured, plays this part"
        )
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for name in OF_PROMPTS:
        if getattr(args, name) != defaults.get_default(name):
            raise UsageError(f"--{name} is for text-to-image models, and the base is {title}")


def make_settings(args: argparse.Namespace) -> EvaluationSettings:
    """Return the settings that the flags name.

    Raises:
        UsageError: if a file of prompts cannot be read.
    """
    from dataclasses import fields

    names = {field.name for field in fields(EvaluationSettings)}
    values = {name: value for name, value in vars(args).items() if name in names}
    paraphrases = read_prompts("--paraphrases", None, args.paraphrases_file)
    lists = {name: tuple(values[name]) for name in ("prompt_noise", "attack_starts")}
    return EvaluationSettings(**values | lists | {"paraphrases": tuple(paraphrases)})


def digest_of_folder(where: str) -> str | None:
    """Return the digest of the weights in a folder, by which `siss push` knows them; None for a name on the Hub."""
    from siss_diffusers.hub.contents import weights_digest

    return weights_digest(Path(where)) if os.path.isdir(where) else None

"""Rank prompts by how strongly a text-to-image model memorized an image for them.

Measured for each prompt, on samples of the same seeds: how alike they are; the text-conditional noise norm (Wen et al.,
ICLR 2024), its mean over the sampling steps and its value at the first; and, if training images are given, the best match
among them. A prompt is flagged if it exceeds every one of the ordinary prompts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from siss_diffusers.commands.audit_prompts import AuditedPrompts, add_prompt_arguments, gather_prompts
from siss_diffusers.commands.audit_table import (
    MEASURES,
    compare_with_ordinary,
    draw_chart,
    print_separations,
    print_table,
    rank_rows,
    separate,
    write_table,
)
from siss_diffusers.commands.common import (
    MODEL_FLAG,
    add_model_arguments,
    add_sampling_arguments,
    announce,
    check_same_settings,
    check_unused_folder,
    count_of,
    load_pipeline,
    open_text_to_image_model,
    read_object,
    sampling_settings,
    settings_of_samples,
)
from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import path, positive_int
from siss_diffusers.storage.files import write_json
from siss_diffusers.storage.folders import made_folder, refuse_folder_within


if TYPE_CHECKING:
    from torch import Tensor

# The settings that the figures depend on.
SETTINGS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "num_samples", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss audit`."""
    parser.add_argument(
        MODEL_FLAG,
        type=path,
        required=True,
        help="A pipeline that takes prompts, such as Stable Diffusion: a folder, or a name on the Hub.",
    )
    parser.add_argument("--adapter", type=path, help="A LoRA adapter to load into it: a folder, or a name on the Hub.")
    add_prompt_arguments(parser)
    parser.add_argument(
        "--train_data_dir", type=path, help="A folder of training images, among which the best match is found."
    )
    parser.add_argument(
        "--num_samples", type=positive_int, default=8, help="Samples of each prompt; default: %(default)s."
    )
    parser.add_argument(
        "--rank_by",
        choices=MEASURES,
        default="self_similarity",
        help="What the table is sorted by; default: %(default)s.",
    )
    parser.add_argument("--show_prompts", action="store_true", help="Print the prompts, not only their numbers.")
    parser.add_argument(
        "--output_dir", type=path, default="audit", help="Where the tables and pictures go; default: %(default)s."
    )
    parser.add_argument("--cache_dir", type=path, help="Where downloaded models and data sets are kept.")
    add_model_arguments(parser)
    add_sampling_arguments(parser, batch_size=16)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        UsageError: naming the flag.
    """
    if args.guidance_scale is not None and args.guidance_scale <= 1:
        raise UsageError("--guidance_scale must be above 1: without guidance there is no noise norm to measure")
    if args.rank_by == "best_match" and args.train_data_dir is None and args.reference_column is None:
        raise UsageError("--rank_by best_match needs --train_data_dir or --reference_column")
    if args.rank_by == "self_similarity" and args.num_samples < 2:
        raise UsageError("--rank_by self_similarity needs --num_samples of at least 2")
    if args.train_data_dir is not None:
        from siss_diffusers.data.listing import require_folder

        require_folder("--train_data_dir", args.train_data_dir)
    read = {"--train_data_dir": args.train_data_dir, "--dataset_name": args.dataset_name}
    refuse_folder_within("--output_dir", args.output_dir, read)


def check_output_dir(output_dir: Path, settings: dict) -> None:
    """Check that the folder is new, or holds an audit with the same settings.

    Raises:
        UsageError: for anything else.
    """
    file = output_dir / "settings.json"
    if file.exists():
        check_same_settings(output_dir, "an audit with", read_object("--output_dir", file), settings)
    else:
        check_unused_folder(output_dir)


def save_grid(path: Path, images: "Tensor") -> None:
    """Save samples `(N, C, H, W)` in [0, 1] as one picture."""
    from torchvision.utils import save_image

    save_image(images, path, nrow=4, padding=2)


def main(args: argparse.Namespace) -> None:
    """Run `siss audit`.

    Raises:
        UsageError: for bad input.
    """
    check_arguments(args)
    audited = gather_prompts(args)
    output_dir = Path(args.output_dir)
    settings = settings_of_samples(args, SETTINGS) | {"adapter": args.adapter, "images": args.train_data_dir}
    if args.reference_column is not None:
        settings |= {"reference_column": args.reference_column, "prompts_file": args.prompts_file}
    check_output_dir(output_dir, settings)
    with made_folder("--output_dir", output_dir):
        rows = measure_prompts(audited, args, output_dir, settings)
    if rows is None:
        return
    separations = separate(rows, audited.memorized)
    ordinary = [row for row in rows if row["prompt"] in set(audited.ordinary)]
    rows = rows[: len(audited.prompts)]
    compare_with_ordinary(rows, ordinary)
    rows = rank_rows(rows, args.rank_by)
    write_table(output_dir / "audit.csv", rows)
    table = {"prompts": rows, "ordinary": ordinary, "rank_by": args.rank_by}
    write_json(output_dir / "audit.json", table | ({"separation": separations} if separations else {}))
    draw_chart(output_dir / "audit.png", rows, ordinary, args.rank_by)
    print_table(rows, ordinary, args.show_prompts)
    print_separations(separations)
    for reason in sorted({row["no_noise_norm"] for row in rows if "no_noise_norm" in row}):
        print(f"There is no noise norm: {reason}.")
    print(f"The prompts are in {output_dir / 'audit.csv'}, their samples beside it.")


def measure_prompts(
    audited: AuditedPrompts, args: argparse.Namespace, output_dir: Path, settings: dict
) -> list[dict] | None:
    """Measure the prompts on all processes, and save the figures and samples of each. What an earlier, interrupted audit
    has measured is read from its files.

    Returns:
        A row of figures for each prompt, in their order; None on all but the main process.

    Raises:
        UsageError: for a model or training images that cannot be used.
    """
    from accelerate import PartialState

    from siss_diffusers.auditing import load_references, load_training_images, measure_prompt
    from siss_diffusers.distributed import on_all_processes, on_main_process
    from siss_diffusers.families.prompts import warn_of_long_prompts

    source, family = open_text_to_image_model(args)
    prompts, training = audited.all, None
    references = load_references(audited.references, family.resolution)
    if args.train_data_dir is not None:
        training = load_training_images(args.train_data_dir, family.resolution)
        announce(f"Comparing with {count_of(len(training.names), 'training image')} in {args.train_data_dir}")
        if training.passed_over:
            announce(f"--train_data_dir: passed over {training.passed_over}")
    state, sampling = PartialState(), sampling_settings(args)
    pipeline = load_pipeline(source, family, args.dtype, args.adapter)
    warn_of_long_prompts(family, pipeline, prompts)
    if state.is_main_process:
        for name in ("prompts", "samples"):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "settings.json", settings)
    state.wait_for_everyone()

    def measure(numbered: tuple[str, str]) -> dict:
        number, prompt = numbered
        figures, samples = measure_prompt(
            family, pipeline, prompt, args.num_samples, sampling, references.get(prompt, training)
        )
        unknown = {"best_match": None} if references else {}  # of a prompt without a reference
        row = {"number": number, "prompt": prompt} | unknown | figures
        save_grid(output_dir / "samples" / f"{number}.png", samples)
        write_json(output_dir / "prompts" / f"{number}.json", row)
        return row

    width = len(str(len(prompts)))
    numbered = [(f"{index:0{width}d}", prompt) for index, prompt in enumerate(prompts, start=1)]
    # Only what is left is shared out: a process without work would wait for the others, and not for ever.
    rows = on_main_process(lambda: read_measured(output_dir, numbered))
    left = [entry for entry in numbered if entry not in rows]
    announce(f"Sampling {count_of(len(left), 'prompt')}, {count_of(args.num_samples, 'sample')} each")
    rows |= zip(left, on_all_processes(measure, left, "Prompts"), strict=True)
    return [rows[entry] for entry in numbered] if state.is_main_process else None


def read_measured(output_dir: Path, numbered: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """Return the figures that an earlier, interrupted audit left, by number and prompt.

    Raises:
        UsageError: for a file that cannot be read.
    """
    rows = {}
    for number, prompt in numbered:
        file = output_dir / "prompts" / f"{number}.json"
        row = read_object("--output_dir", file) if file.exists() else {}
        if row.get("prompt") == prompt:
            rows[number, prompt] = row
    return rows

"""Rank prompts by how strongly a text-to-image model memorized an image for them.

Measured for each prompt, on samples of the same seeds: how alike they are; the text-conditional noise norm (Wen et al.,
ICLR 2024), its mean over the sampling steps and its value at the first; and, if training images are given, the best match
among them. A prompt is flagged if it exceeds every one of the ordinary prompts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from siss_diffusers.commands.audit_table import (
    MEASURES,
    compare_with_ordinary,
    draw_chart,
    print_table,
    rank_rows,
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
    read_prompts,
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
    parser.add_argument("--prompts", nargs="+", help="The prompts to audit.")
    parser.add_argument("--prompts_file", type=path, help="A text file with a prompt on each line.")
    parser.add_argument(
        "--dataset_name", type=path, help="A data set whose captions are audited: a folder, or a name on the Hub."
    )
    parser.add_argument("--caption_column", default="text", help="Its column of captions; default: %(default)s.")
    parser.add_argument("--max_prompts", type=positive_int, help="Audit the first so many prompts only.")
    parser.add_argument("--ordinary_prompts", nargs="+", help="Prompts that are certainly not memorized.")
    parser.add_argument(
        "--ordinary_prompts_file",
        type=path,
        help="A text file of such prompts. A prompt is flagged if it exceeds all of them in a measure. Of ordinary"
        " prompts, each measure flags 1 in (their number + 1).",
    )
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


def gather_prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the prompts to audit, and the ordinary ones.

    Raises:
        UsageError: if there is no prompt to audit, or a file or data set cannot be read.
    """
    prompts = read_prompts("--prompts", args.prompts, args.prompts_file)
    if args.dataset_name is not None:
        captions = read_captions(args.dataset_name, args.caption_column, args.cache_dir)
        prompts = list(dict.fromkeys([*prompts, *captions]))
    if not prompts:
        raise UsageError("nothing to audit: give --prompts, --prompts_file or --dataset_name")
    ordinary = read_prompts("--ordinary_prompts", args.ordinary_prompts, args.ordinary_prompts_file)
    return prompts[: args.max_prompts], ordinary


def read_captions(dataset_name: str, caption_column: str, cache_dir: str | None) -> list[str]:
    """Return the captions of a data set, of several for an image each.

    Raises:
        UsageError: if it cannot be loaded, or has no such column of texts.
    """
    from siss_diffusers.data.captions import every_text_of, texts_of
    from siss_diffusers.data.sources import load_rows

    loaded = load_rows("--dataset_name", dataset_name, cache_dir=cache_dir)
    if loaded.passed_over:
        announce(f"--dataset_name: passed over {loaded.passed_over}")
    captions = every_text_of(loaded.rows, caption_column) if caption_column in loaded.rows.features else []
    if not captions:
        raise UsageError(
            f"--caption_column: {dataset_name} has no column of texts {caption_column!r}, only"
            f" {', '.join(loaded.rows.features)}"
        )
    without = texts_of(loaded.rows, caption_column).null_count
    if without:
        announce(f"--dataset_name: {count_of(without, 'row')} of {len(loaded.rows)} without a caption are not audited")
    return captions


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        UsageError: naming the flag.
    """
    if args.guidance_scale is not None and args.guidance_scale <= 1:
        raise UsageError("--guidance_scale must be above 1: without guidance there is no noise norm to measure")
    if args.rank_by == "best_match" and args.train_data_dir is None:
        raise UsageError("--rank_by best_match needs --train_data_dir")
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
    prompts, ordinary_prompts = gather_prompts(args)
    check_arguments(args)
    output_dir = Path(args.output_dir)
    settings = settings_of_samples(args, SETTINGS) | {"adapter": args.adapter, "images": args.train_data_dir}
    check_output_dir(output_dir, settings)
    # A prompt in both lists is measured once. It reaches its own value, so it is never flagged.
    with made_folder("--output_dir", output_dir):
        rows = measure_prompts(list(dict.fromkeys([*prompts, *ordinary_prompts])), args, output_dir, settings)
    if rows is None:
        return
    ordinary = [row for row in rows if row["prompt"] in set(ordinary_prompts)]
    rows = rows[: len(prompts)]
    compare_with_ordinary(rows, ordinary)
    rows = rank_rows(rows, args.rank_by)
    write_table(output_dir / "audit.csv", rows)
    write_json(output_dir / "audit.json", {"prompts": rows, "ordinary": ordinary, "rank_by": args.rank_by})
    draw_chart(output_dir / "audit.png", rows, ordinary, args.rank_by)
    print_table(rows, ordinary, args.show_prompts)
    for reason in sorted({row["no_noise_norm"] for row in rows if "no_noise_norm" in row}):
        print(f"There is no noise norm: {reason}.")
    print(f"The prompts are in {output_dir / 'audit.csv'}, their samples beside it.")


def measure_prompts(
    prompts: Sequence[str], args: argparse.Namespace, output_dir: Path, settings: dict
) -> list[dict] | None:
    """Measure the prompts on all processes, and save the figures and samples of each. What an earlier, interrupted audit
    has measured is read from its files.

    Returns:
        A row of figures for each prompt, in their order; None on all but the main process.

    Raises:
        UsageError: for a model or training images that cannot be used.
    """
    from accelerate import PartialState

    from siss_diffusers.auditing import load_training_images, measure_prompt
    from siss_diffusers.distributed import on_all_processes
    from siss_diffusers.families.prompts import warn_of_long_prompts

    source, family = open_text_to_image_model(args)
    training = None
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
        file = output_dir / "prompts" / f"{number}.json"
        if file.exists():
            row = read_object("--output_dir", file)
            if row.get("prompt") == prompt:
                return row
        figures, samples = measure_prompt(family, pipeline, prompt, args.num_samples, sampling, training)
        row = {"number": number, "prompt": prompt} | figures
        save_grid(output_dir / "samples" / f"{number}.png", samples)
        write_json(file, row)
        return row

    width = len(str(len(prompts)))
    numbered = [(f"{index:0{width}d}", prompt) for index, prompt in enumerate(prompts, start=1)]
    announce(f"Sampling {count_of(len(prompts), 'prompt')}, {count_of(args.num_samples, 'sample')} each")
    rows = on_all_processes(measure, numbered, "Prompts")
    return rows if state.is_main_process else None

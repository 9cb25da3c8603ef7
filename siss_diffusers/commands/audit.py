"""Rank prompts by how strongly a text-to-image model memorized an image for them.

Measured for each prompt, on samples of the same seeds: how alike they are; the text-conditional noise norm (Wen et al.,
ICLR 2024), its mean over the sampling steps and its value at the first; and, if training images are given, the best match
among them. A prompt is flagged if it exceeds every one of the ordinary prompts.
"""

import argparse
import csv
import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from siss_diffusers.commands.common import (
    MODEL_FLAG,
    add_sampling_arguments,
    announce,
    count_of,
    load_pipeline,
    open_text_to_image_model,
    read_object,
    read_prompts,
    sampling_settings,
    warn_of_long_prompts,
)
from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import positive_int
from siss_diffusers.storage.files import write_json


if TYPE_CHECKING:
    from torch import Tensor

# The settings that the figures depend on.
SETTINGS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "num_samples", "dtype")
MEASURES = ("self_similarity", "noise_norm", "noise_norm_first", "best_match")
SHOWN_IN_CHART, SHOWN_IN_TABLE = 40, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss audit`."""
    parser.add_argument(
        MODEL_FLAG,
        required=True,
        help="A pipeline that takes prompts, such as Stable Diffusion: a folder, or on the Hub.",
    )
    parser.add_argument("--adapter", help="A LoRA adapter to load into it: a folder, or on the Hub.")
    parser.add_argument("--prompts", nargs="+", help="The prompts to audit.")
    parser.add_argument("--prompts_file", help="A text file with a prompt on each line.")
    parser.add_argument("--dataset_name", help="A data set whose captions are audited: a folder, or on the Hub.")
    parser.add_argument("--caption_column", default="text", help="Its column of captions; default: text.")
    parser.add_argument("--max_prompts", type=positive_int, help="Audit at most so many, from the first.")
    parser.add_argument("--ordinary_prompts", nargs="+", help="Prompts that are certainly not memorized.")
    parser.add_argument(
        "--ordinary_prompts_file",
        help="A text file of such prompts. A prompt is flagged if it exceeds all of them in a measure. Of ordinary"
        " prompts, each measure flags 1 in (their number + 1).",
    )
    parser.add_argument("--train_data_dir", help="A folder of training images, among which the best match is found.")
    parser.add_argument("--num_samples", type=positive_int, default=8, help="Samples of each prompt; default: 8.")
    parser.add_argument(
        "--rank_by",
        choices=MEASURES,
        default="self_similarity",
        help="What the table is sorted by; default: self_similarity.",
    )
    parser.add_argument("--show_prompts", action="store_true", help="Print the prompts, not only their numbers.")
    parser.add_argument("--output_dir", default="audit", help="Where the tables and pictures go; default: audit.")
    parser.add_argument("--cache_dir", help="Where data sets are kept.")
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
    """Return the captions of a data set.

    Raises:
        UsageError: if it cannot be loaded, or has no such column of texts.
    """
    import datasets

    from siss_diffusers.data.sources import load_rows

    rows = load_rows("--dataset_name", dataset_name, cache_dir=cache_dir)
    if not isinstance(rows.features.get(caption_column), datasets.Value):
        raise UsageError(
            f"--caption_column: {dataset_name} has no column of texts {caption_column!r}, only"
            f" {', '.join(rows.features)}"
        )
    return [caption for caption in rows[caption_column] if isinstance(caption, str)]


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        UsageError: naming the flag.
    """
    if args.guidance_scale <= 1:
        raise UsageError("--guidance_scale must be above 1: without guidance there is no noise norm to measure")
    if args.rank_by == "best_match" and args.train_data_dir is None:
        raise UsageError("--rank_by best_match needs --train_data_dir")
    if args.rank_by == "self_similarity" and args.num_samples < 2:
        raise UsageError("--rank_by self_similarity needs --num_samples of at least 2")
    if args.train_data_dir is not None and not os.path.isdir(args.train_data_dir):
        raise UsageError(f"--train_data_dir: no folder {args.train_data_dir or repr(args.train_data_dir)}")


def check_output_dir(output_dir: Path, settings: dict) -> None:
    """Check that the folder is new, or holds an audit with the same settings.

    Raises:
        UsageError: for anything else.
    """
    file = output_dir / "settings.json"
    if file.exists():
        earlier = read_object("--output_dir", file)
        differing = [name for name in settings if earlier.get(name) != settings[name]]
        if differing:
            raise UsageError(
                f"--output_dir: {output_dir} holds an audit with another {', '.join(differing)}; name another folder"
            )
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"--output_dir: {output_dir} is there and holds no audit; name another folder")


def compare_with_ordinary(rows: list[dict], ordinary: list[dict]) -> None:
    """Add to each row its p-values and whether it is flagged.

    The p-value of a measure is that of a permutation test: the share of the ordinary prompts, and this prompt itself,
    that reach its value. A prompt is flagged if it exceeds all ordinary prompts in some measure.
    """
    for row in rows:
        row["p_values"] = {}
        for name in MEASURES:
            if row.get(name) is not None:
                reaching = sum(other[name] is not None and other[name] >= row[name] for other in ordinary)
                row["p_values"][name] = (1 + reaching) / (1 + len(ordinary))
        row["flagged"] = bool(ordinary) and min(row["p_values"].values(), default=1) == 1 / (1 + len(ordinary))


def rank_rows(rows: list[dict], rank_by: str) -> list[dict]:
    """Sort rows by a measure, the highest first, and number them. Rows without it come last."""
    rows = sorted(rows, key=lambda row: -(row[rank_by] if row[rank_by] is not None else -inf))
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """Write the rows as CSV."""
    columns = ["rank", "number", "flagged", *MEASURES, "best_match_file", "prompt"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw_chart(path: Path, rows: list[dict], ordinary: list[dict], measure: str) -> None:
    """Draw the first rows of the table as bars, and a line at the highest ordinary prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = rows[:SHOWN_IN_CHART]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.22 * len(shown)), layout="constrained")
    colors = ["tab:red" if row["flagged"] else "tab:blue" for row in shown]
    axis.barh(range(len(shown)), [row[measure] or 0 for row in shown], color=colors)
    axis.set_yticks(range(len(shown)), [f"prompt {row['number']}" for row in shown], fontsize=8)
    axis.invert_yaxis()
    if ordinary:
        highest = max((row[measure] for row in ordinary if row[measure] is not None), default=None)
        if highest is not None:
            axis.axvline(highest, color="grey", linestyle=":", label="highest ordinary prompt")
            axis.legend(frameon=False)
    axis.set_xlabel(measure)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"model": args.pretrained_model_name_or_path, "adapter": args.adapter, "images": args.train_data_dir}
    check_output_dir(output_dir, settings)
    # A prompt in both lists is measured once. It reaches its own value, so it is never flagged.
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

    source, family = open_text_to_image_model(args.pretrained_model_name_or_path, args.resolution, args.cache_dir)
    training = None
    if args.train_data_dir is not None:
        training = load_training_images(args.train_data_dir, family.resolution)
        announce(f"Comparing with {count_of(len(training.names), 'training image')} in {args.train_data_dir}")
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


def print_table(rows: list[dict], ordinary: list[dict], show_prompts: bool) -> None:
    """Print the first rows. Prompts are shown only on request: they may be what has to be forgotten."""
    measures = [name for name in MEASURES if any(row.get(name) is not None for row in rows)]
    print(f"\n{'rank':>4} {'prompt':>8} {'':7}" + "".join(f"{name:>18}" for name in measures))

    def format_figures(row: dict) -> str:
        return "".join(f"{'-' if row[name] is None else format(row[name], '.3f'):>18}" for name in measures)

    for row in rows[:SHOWN_IN_TABLE]:
        mark = "flagged" if row["flagged"] else ""
        text = f"  {row['prompt']}" if show_prompts else ""
        print(f"{row['rank']:4} {row['number']:>8} {mark:7}{format_figures(row)}{text}")
    if len(rows) > SHOWN_IN_TABLE:
        print(f"... and {len(rows) - SHOWN_IN_TABLE} more")
    if not ordinary:
        print("\nNo prompt is flagged: --ordinary_prompts_file says what is ordinary.")
        return
    highest = {name: max((row[name] for row in ordinary if row[name] is not None), default=None) for name in measures}
    print(f"{'':4} {'highest of ' + str(len(ordinary)) + ' ordinary':16}{format_figures(highest)}")
    print(
        f"\n{sum(row['flagged'] for row in rows)} of {len(rows)} prompts exceed all {len(ordinary)} ordinary"
        f" prompts in a measure. Of ordinary prompts, 1 in {len(ordinary) + 1} would, in each measure."
    )

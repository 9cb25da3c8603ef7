"""Rank prompts by how strongly a Stable Diffusion model memorized an image for them.

Measured for each prompt, on samples of the same seeds: how alike they are; the text-conditional noise norm (Wen et al.,
ICLR 2024), its mean over the sampling steps and its value at the first; and, where training images are given, the best
match among them. A prompt is flagged where it exceeds every one of the ordinary prompts.
"""

import argparse
import csv
import os
from math import inf, isfinite
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from siss_diffusers.commands.common import (
    add_sampling_arguments,
    load_resolution,
    load_stable_diffusion,
    on_all_processes,
    read_prompts,
    read_state,
    sample_batch,
    warn_of_long_prompts,
)
from siss_diffusers.data.images import ImageTransform, read_image
from siss_diffusers.data.sources import load_rows
from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.families.stable_diffusion import check_stable_diffusion
from siss_diffusers.flags import positive_int
from siss_diffusers.metrics.copies import correlation, for_detectors
from siss_diffusers.metrics.noise_norm import TextNoiseNorms, first_noise_norm, mean_noise_norm
from siss_diffusers.noising import GaussianPath
from siss_diffusers.storage.files import write_json


# What an audit is made of; another value of any of these makes another audit.
SETTINGS = ("seed", "num_inference_steps", "guidance_scale", "resolution", "num_samples", "dtype")
MEASURES = ("self_similarity", "noise_norm", "noise_norm_first", "best_match")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="A Stable Diffusion pipeline: a folder, or on the Hub."
    )
    parser.add_argument("--adapter", help="A LoRA adapter to load into it: a folder, or on the Hub.")
    parser.add_argument("--prompts", nargs="+", help="The prompts to audit.")
    parser.add_argument("--prompts_file", help="A text file with a prompt on each line.")
    parser.add_argument("--dataset_name", help="A data set whose captions are audited: a folder, or on the Hub.")
    parser.add_argument("--caption_column", default="text", help="Its column of captions; default: text.")
    parser.add_argument("--max_prompts", type=positive_int, help="Audit at most so many, from the first.")
    parser.add_argument("--ordinary_prompts", nargs="+", help="Prompts that are surely not memorized.")
    parser.add_argument(
        "--ordinary_prompts_file",
        help="A text file of such prompts. A prompt is flagged where it exceeds all of them, so that of ordinary"
        " prompts 1 in (their number + 1) is flagged for each measure.",
    )
    parser.add_argument("--train_data_dir", help="A folder of training images, to find the best match in.")
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
    """The prompts to audit and the ordinary ones.

    Raises:
        UsageError: where there is none, or a file or data set cannot be read.
    """
    prompts = read_prompts("--prompts", args.prompts, args.prompts_file)
    if args.dataset_name is not None:
        prompts = list(dict.fromkeys([*prompts, *read_captions(args)]))
    if not prompts:
        raise UsageError("nothing to audit: give --prompts, --prompts_file or --dataset_name")
    ordinary = read_prompts("--ordinary_prompts", args.ordinary_prompts, args.ordinary_prompts_file)
    return prompts[: args.max_prompts], ordinary


def read_captions(args: argparse.Namespace) -> list[str]:
    import datasets

    rows = load_rows("--dataset_name", args.dataset_name, cache_dir=args.cache_dir)
    if not isinstance(rows.features.get(args.caption_column), datasets.Value):
        raise UsageError(
            f"--caption_column: {args.dataset_name} has no column of texts {args.caption_column!r}, only"
            f" {', '.join(rows.features)}"
        )
    return [caption for caption in rows[args.caption_column] if isinstance(caption, str)]


def load_training_images(folder: str, side: int) -> tuple[list[str], Tensor]:
    """File names within the folder, and pictures `(N, 3, H, W)` in [0, 1] as training would see them, at the size at
    which copies are looked for.

    Raises:
        UsageError: for a folder without images, or one that cannot be read.
    """
    suffixes = set(Image.registered_extensions())
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UsageError(f"--train_data_dir: no images in {folder}")
    transform = ImageTransform(channels=3, resolution=side, center_crop=True, random_flip=False)
    pictures = []
    for file in files:
        try:
            pictures.append(for_detectors(transform(read_image(file))[None] / 2 + 0.5)[0])
        except ValueError as error:
            raise UsageError(f"--train_data_dir: cannot read {file} ({describe_error(error)}); repair or remove it")
    return [file.relative_to(folder).as_posix() for file in files], torch.stack(pictures)


def self_similarity(images: Tensor) -> float | None:
    """How alike a prompt's samples `(N, C, H, W)` are: 1 less the lower quartile of their pixel distances to each other,
    over their mean contrast (distance to their own mean brightness). 1 where most are the same picture, about
    1 - sqrt(2) for unrelated ones; None for one sample.

    The quartile finds a picture that half of the samples are, however different the others. A correlation does less:
    pictures of one kind, all digits, correlate by 0.9 without being copies of each other.
    """
    if len(images) < 2:
        return None
    distances = torch.pdist(images.flatten(1))
    contrast = (images - images.mean(dim=(2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
    return (1 - distances.quantile(0.25) / contrast.clamp(min=1e-6)).item()


def measure(pipeline, prompt: str, args: argparse.Namespace, training: tuple[list[str], Tensor] | None) -> dict:
    """The figures of a prompt, and its samples under `images`."""
    with TextNoiseNorms(pipeline.unet, GaussianPath.from_scheduler(pipeline.scheduler)) as norms:
        images = sample_batch(pipeline, [prompt] * args.num_samples, args, args.seed)
    found = {
        "self_similarity": self_similarity(images),
        "noise_norm": mean_noise_norm(norms.per_step()).mean().item(),
        "noise_norm_first": first_noise_norm(norms.per_step()).mean().item(),
        "images": images,
    }
    if training is not None:
        names, pictures = training
        # Of each training image the sample that is most like it.
        small = for_detectors(images)
        likeness = torch.stack([correlation(small, picture[None]).max() for picture in pictures])
        found |= {"best_match": likeness.max().item(), "best_match_file": names[int(likeness.argmax())]}
    # Half precision overflows; what is no number is no ground for suspicion either.
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in found.items()}


def flag(rows: list[dict], ordinary: list[dict]) -> None:
    """To every row: for each measure the share of the ordinary prompts that reach its value, counting itself among
    them (the p-value of a permutation test), and whether it exceeds all of them in any."""
    for row in rows:
        row["p_values"] = {}
        for name in MEASURES:
            if row.get(name) is not None:
                reached = sum(other[name] is not None and other[name] >= row[name] for other in ordinary)
                row["p_values"][name] = (1 + reached) / (1 + len(ordinary))
        row["flagged"] = bool(ordinary) and min(row["p_values"].values(), default=1) == 1 / (1 + len(ordinary))


def write_table(path: Path, rows: list[dict]) -> None:
    columns = ["rank", "number", "flagged", *MEASURES, "best_match_file", "prompt"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw_chart(path: Path, rows: list[dict], ordinary: list[dict], measure: str) -> None:
    """Bars of the first rows of the table, and where the ordinary prompts end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = rows[:40]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.22 * len(shown)), layout="constrained")
    colors = ["tab:red" if row["flagged"] else "tab:blue" for row in shown]
    axis.barh(range(len(shown)), [row[measure] or 0 for row in shown], color=colors)
    axis.set_yticks(range(len(shown)), [f"prompt {row['number']}" for row in shown], fontsize=8)
    axis.invert_yaxis()
    if ordinary:
        axis.axvline(
            max(row[measure] for row in ordinary), color="grey", linestyle=":", label="highest ordinary prompt"
        )
        axis.legend(frameon=False)
    axis.set_xlabel(measure)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_grid(path: Path, images: Tensor) -> None:
    from torchvision.utils import save_image

    save_image(images, path, nrow=4, padding=2)


def check_settings(args: argparse.Namespace, output_dir: Path) -> dict:
    """What the audit depends on, for `settings.json`.

    Raises:
        UsageError: where something else is in --output_dir, or an audit with other settings.
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"model": args.pretrained_model_name_or_path, "adapter": args.adapter, "images": args.train_data_dir}
    file = output_dir / "settings.json"
    if file.exists():
        found = read_state("--output_dir", file)
        differing = [name for name in settings if found.get(name) != settings[name]]
        if differing:
            raise UsageError(
                f"--output_dir: {output_dir} holds an audit with another {', '.join(differing)}; name another folder"
            )
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"--output_dir: {output_dir} is there and holds no audit; name another folder")
    return settings


def main(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    prompts, ordinary_prompts = gather_prompts(args)
    if args.guidance_scale <= 1:
        raise UsageError("--guidance_scale must be above 1: without guidance there is no noise norm to measure")
    if args.rank_by == "best_match" and args.train_data_dir is None:
        raise UsageError("--rank_by best_match needs --train_data_dir")
    if args.rank_by == "self_similarity" and args.num_samples < 2:
        raise UsageError("--rank_by self_similarity needs --num_samples of at least 2")
    output_dir = Path(args.output_dir)
    settings = check_settings(args, output_dir)
    if args.train_data_dir is not None and not os.path.isdir(args.train_data_dir):
        raise UsageError(f"--train_data_dir: no folder {args.train_data_dir or repr(args.train_data_dir)}")
    check_stable_diffusion(
        args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", cache_dir=args.cache_dir
    )
    side = load_resolution(args, args.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    training = None if args.train_data_dir is None else load_training_images(args.train_data_dir, side)
    state = PartialState()
    pipeline = load_stable_diffusion(
        args, args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", args.adapter
    )
    warn_of_long_prompts(pipeline, [*prompts, *ordinary_prompts])
    if state.is_main_process:
        for name in ("prompts", "samples"):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "settings.json", settings)
    state.wait_for_everyone()

    def audited(numbered: tuple[str, str]) -> dict:
        """From disk where an earlier, interrupted audit got so far."""
        name, prompt = numbered
        file = output_dir / "prompts" / f"{name}.json"
        if file.exists():
            row = read_state("--output_dir", file)
            if row.get("prompt") == prompt:
                return row
        row = {"number": name, "prompt": prompt} | measure(pipeline, prompt, args, training)
        save_grid(output_dir / "samples" / f"{name}.png", row.pop("images"))
        write_json(file, row)
        return row

    # A prompt in both lists is measured once; it is reached by itself, so it is never flagged.
    unseen = [prompt for prompt in ordinary_prompts if prompt not in set(prompts)]
    width = len(str(len(prompts) + len(unseen)))
    numbered = [(f"{index:0{width}d}", prompt) for index, prompt in enumerate([*prompts, *unseen], start=1)]
    found = on_all_processes(audited, numbered, "Prompts")
    if not state.is_main_process:
        return
    rows = found[: len(prompts)]
    ordinary = [row for row in found if row["prompt"] in set(ordinary_prompts)]
    flag(rows, ordinary)
    rows.sort(key=lambda row: -(row[args.rank_by] if row[args.rank_by] is not None else -inf))
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank
    write_table(output_dir / "audit.csv", rows)
    write_json(output_dir / "audit.json", {"prompts": rows, "ordinary": ordinary, "rank_by": args.rank_by})
    draw_chart(output_dir / "audit.png", rows, ordinary, args.rank_by)
    print_table(rows, ordinary, args)


def print_table(rows: list[dict], ordinary: list[dict], args: argparse.Namespace) -> None:
    """The first twenty; without the prompts unless asked, for they may be what has to be forgotten."""
    measures = [name for name in MEASURES if any(row.get(name) is not None for row in rows)]
    print(f"\n{'rank':>4} {'prompt':>8} {'':7}" + "".join(f"{name:>18}" for name in measures))

    def figures(row: dict) -> str:
        return "".join(f"{'-' if row[name] is None else format(row[name], '.3f'):>18}" for name in measures)

    for row in rows[:20]:
        mark = "flagged" if row["flagged"] else ""
        text = f"  {row['prompt']}" if args.show_prompts else ""
        print(f"{row['rank']:4} {row['number']:>8} {mark:7}{figures(row)}{text}")
    if len(rows) > 20:
        print(f"... and {len(rows) - 20} more")
    if ordinary:
        highest = {
            name: max((row[name] for row in ordinary if row[name] is not None), default=None) for name in measures
        }
        print(f"{'':4} {'highest of ' + str(len(ordinary)) + ' ordinary':16}{figures(highest)}")
        print(
            f"\n{sum(row['flagged'] for row in rows)} of {len(rows)} prompts exceed all {len(ordinary)} ordinary prompts"
            f" in a measure; of ordinary prompts, 1 in {len(ordinary) + 1} would, in each."
        )
    else:
        print("\nNothing is flagged: --ordinary_prompts_file would say what is ordinary.")
    print(f"The prompts are in {Path(args.output_dir) / 'audit.csv'}, their samples beside it.")
